"""The only I/O: one protocol, several bodies (a real API server, processes on this machine, virtual time)."""
