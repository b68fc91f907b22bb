"""The cache of the outputs of frozen encoders, and the map phase that fills it."""
