"""Benchmarks. Each one prints its progress, a table, and a line of JSON at the end."""
