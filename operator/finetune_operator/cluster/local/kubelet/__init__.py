"""The local kubelet: runs the pods of one job as process trees on this machine."""
