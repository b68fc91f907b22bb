"""Which sample is used when, and every random number drawn for it. Pure."""
