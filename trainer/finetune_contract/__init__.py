"""What the operator and the trainer say to each other. Free of torch; imports neither side."""
