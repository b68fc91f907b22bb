"""The contract between operator and trainer. Free of torch; imports neither side."""

__version__ = "0.1.0"
"""Version of the distribution, the chart and the images. The only place that defines it (see RELEASE.md)."""
