"""Delivery of written outputs to their targets: folders, object stores and repositories of the hub."""
