"""The HTTP endpoint for the supervisors' heartbeats. `beats` decides which count; only `server` uses HTTP."""
