"""The space that a run needs on its volumes."""
