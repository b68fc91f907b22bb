"""One policy per file. `registry` lists them once, in the order in which they decide."""
