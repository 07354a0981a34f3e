"""The paper's own ground: what its tables say, reckoned and measured."""
