"""The coordinator's certificate authority and its TLS contexts."""
