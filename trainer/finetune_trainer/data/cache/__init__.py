"""The cache of frozen encoder outputs, and the map phase that fills it."""
