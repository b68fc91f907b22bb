"""The ranks of one attempt: who they are, and the few collectives that the loop needs."""
