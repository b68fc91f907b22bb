"""How the ranks of a script agree between two steps, and hold copies of the states of others."""
