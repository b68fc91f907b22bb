"""Kueue's objects: the jobs' Workloads and the flavors of the queues."""
