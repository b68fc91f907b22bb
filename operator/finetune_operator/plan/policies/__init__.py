"""One policy per file. `plan.registry` lists them in the order in which they decide."""
