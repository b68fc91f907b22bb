"""PID 1 of a training pod: starts the ranks, relays signals and heartbeats, and writes the pod's termination message.

Does not import torch. Run as `finetune-supervisor` or `python -m finetune_trainer.supervisor`.
"""
