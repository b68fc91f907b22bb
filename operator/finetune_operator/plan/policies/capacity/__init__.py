"""Policies that fit the gang to the available nodes: its size, spot or other nodes, and standby pods."""
