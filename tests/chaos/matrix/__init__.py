"""The kill matrix: its cells, the injection of faults into real processes, and the expected results."""
