"""Base models: one file per family. They find and read the parts of a base and define its training objective."""
