"""What ``babelray doctor`` looks at: this machine, storage, the cluster, its network."""
