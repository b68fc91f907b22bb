"""Base models: finding and reading their parts, and the noise schedule that they were trained with."""
