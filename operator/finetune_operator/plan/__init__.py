"""Pure: (job, observed, now) -> Plan(actions, status). No clock, no socket, no file."""
