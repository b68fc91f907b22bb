"""What benches and tests use to measure: devices, peak memory, processes of their own, reports."""
