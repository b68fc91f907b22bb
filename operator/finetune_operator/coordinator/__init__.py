"""The endpoint that supervisors beat to."""
