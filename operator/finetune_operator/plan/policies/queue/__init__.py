"""Policies of a job with a queue: its request, its eviction, and what it tells the queue."""
