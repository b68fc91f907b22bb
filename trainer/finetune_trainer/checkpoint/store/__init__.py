"""Where checkpoints are stored: one file per kind of storage, with a common base."""
