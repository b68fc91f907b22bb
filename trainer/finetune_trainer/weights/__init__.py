"""Tensors that are read, changed and written in pieces, so that no model is ever complete in memory."""
