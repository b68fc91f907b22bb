"""The ranks of one attempt, their collectives and their gradients."""
