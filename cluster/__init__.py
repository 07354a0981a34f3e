"""Everything that names Ray or Kubernetes, and the command line."""
