"""Times that both sides know of."""

from __future__ import annotations

from datetime import timedelta

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others, to meet them and in a collective. Only a silent network needs it: a peer that
dies closes its connection, which is seen at once. Ranks also wait this long for the slowest while latents are being
computed."""
