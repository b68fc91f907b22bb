"""Tools of the repository: installation, generated files, mutation checks, documentation hooks."""
