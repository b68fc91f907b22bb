"""A cluster in virtual time: one seed decides all, and a million events take a minute or two.

`engine` has the clock, `server` the objects, `kubelet` nodes and pods, `trainers` what runs in them, `operator` the
process around the real `reconcile`, `faults` what goes wrong. Used by tests/simulation and bench/spot.
"""
