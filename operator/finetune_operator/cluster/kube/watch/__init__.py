"""Caches of API objects, kept current by list and watch."""
