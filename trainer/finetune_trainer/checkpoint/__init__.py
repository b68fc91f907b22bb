"""Saves and restores a run: temporary files first, verification before commit, an attempt fence."""
