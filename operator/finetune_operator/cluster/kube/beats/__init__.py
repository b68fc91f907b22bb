"""Heartbeats on a cluster: authentication, rate limits, intervals and the newest heartbeat of each pod."""
