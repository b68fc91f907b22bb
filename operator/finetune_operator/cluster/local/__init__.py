"""A cluster of processes on this machine, fulfilling `cluster.protocol` (docs/architecture.md, "The local cluster")."""
