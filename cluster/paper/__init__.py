"""Trainings of the paper's comparisons, scheduled by Ray."""
