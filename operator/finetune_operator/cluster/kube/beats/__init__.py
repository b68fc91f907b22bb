"""Heartbeats on a cluster: the TLS endpoint, authentication, rate limits and the newest heartbeat of each pod."""
