"""What users read in the status: phase, conditions, events, progress, timing and goodput."""
