"""Checkpoint stores: one module per kind of storage, with a common base."""
