"""The Transformer of Vaswani et al. 2017 and what it is compared with; knows nothing of training or clusters."""
