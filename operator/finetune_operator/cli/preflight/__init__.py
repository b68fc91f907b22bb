"""Checks of a job against this machine, before anything starts. Each problem is one message that names its field."""
