"""Real nodes on this machine: containerd, kubelets and the control plane in network namespaces."""
