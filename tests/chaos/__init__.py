"""Kill tests: real processes are killed at random or chosen moments, and the weights are compared."""
