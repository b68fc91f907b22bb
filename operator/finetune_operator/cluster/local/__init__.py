"""A cluster of processes on this machine. Implements `cluster.protocol` (docs/architecture.md, "The local cluster")."""
