"""Decodes images to pixels, and generates class images."""
