"""Tiny models, data sets and real rank processes."""
