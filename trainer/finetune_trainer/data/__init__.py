"""Turns a data set into micro-batches: sources, sample order, keyed draws, and the cache of encoder outputs."""
