"""Training methods. Each has one file and one row in the registry; the loop uses only the protocol `Method`."""
