"""Writing what was trained to where the manifest wants it."""
