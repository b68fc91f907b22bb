"""The parts of the status that users read: phase, conditions, events, progress, timing and goodput."""
