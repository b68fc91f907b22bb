"""Export of the trained weights to the outputs of the manifest."""
