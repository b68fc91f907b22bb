"""Timeouts that both sides use."""

from __future__ import annotations

from datetime import timedelta

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Time that a rank waits for the others in the rendezvous and in a collective. It matters only on a network that drops
packets silently: the connection of a peer that exits is closed, which is detected immediately. It also limits the wait
for the slowest rank while latents are computed."""
