"""Simulated clusters and harnesses shared by tests and benches. Not part of the wheel."""
