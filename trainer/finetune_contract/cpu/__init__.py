"""CPU training: its settings, the machine's topology, and the placement of the ranks on it."""
