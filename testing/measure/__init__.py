"""Measurements for benches and tests: devices, peak memory, separate processes, reports."""
