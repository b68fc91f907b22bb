"""The GPU kit without its measurements: their order and time limits, their processes, and the report.

Imports only the standard library: the kit's driver runs before anything is known about the machine.
"""
