"""Measurements and long checks. Each prints progress, a table for people, and JSON as its last line."""
