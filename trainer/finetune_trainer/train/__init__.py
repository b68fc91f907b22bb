"""The training loop, and the lifecycle of a rank: load, cache, restore, train, export."""
