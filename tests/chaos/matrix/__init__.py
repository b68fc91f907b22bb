"""The kill matrix: which cells there are, how a fault is done to real processes, and what must come of it."""
