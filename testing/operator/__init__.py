"""The operator as a process on a real control plane, for tests and benchmarks."""
