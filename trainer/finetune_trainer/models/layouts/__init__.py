"""Layouts of weights: folders of diffusers, files of the original code, and what a method trained."""
