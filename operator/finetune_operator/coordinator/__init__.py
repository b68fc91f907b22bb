"""The HTTP endpoint that supervisors beat to. `beats` decides what counts; `server` alone knows HTTP."""
