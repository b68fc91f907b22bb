"""What can be trained. One method, one file, one row in the registry; the loop knows only the protocol."""
