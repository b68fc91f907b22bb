"""The work queue: which job is reconciled when."""
