"""The one training loop, and the life of a rank around it."""
