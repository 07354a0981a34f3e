"""The Transformer and what it is compared with; knows nothing of training or clusters."""
