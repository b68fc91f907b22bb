"""The only I/O: one protocol, implemented by the Kubernetes cluster, the local cluster and the simulated cluster."""
