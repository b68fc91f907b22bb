"""The trainer: supervisor, training loop, methods, data and checkpoints. Imports the contract, never the operator."""
