"""Checkpoints that cannot be lost: written aside, verified before they count, fenced by attempt."""
