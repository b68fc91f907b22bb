"""Measures how well a rank uses its device: time, memory and operations of the steps. Called by `train`."""
