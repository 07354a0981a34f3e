"""One rank's work: loop, engine, checkpoints, metrics, evaluation."""
