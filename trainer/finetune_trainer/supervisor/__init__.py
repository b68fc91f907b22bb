"""PID 1 of a training pod: starts the ranks, relays signals and beats, and writes the pod's last words.

Knows nothing of torch. Run as `finetune-supervisor` or `python -m finetune_trainer.supervisor`.
"""
