"""Chooses kernels and compiled code for the device of a run; the first attempt's choices are kept for later ones."""
