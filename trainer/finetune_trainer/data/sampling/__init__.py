"""The order of the samples, and the random numbers drawn for each of them. Pure functions."""
