"""A simulated cluster in virtual time: one seed determines everything, and a million events take a minute or two.

`engine` has the clock, `server` the objects, `kubelet` nodes and pods, `gang` and `supervisor` the processes in the
pods, `operator` the process around the real `reconcile`, `faults` the injected faults, and `cluster` all of them
together. Used by tests/simulation and bench/spot.
"""
