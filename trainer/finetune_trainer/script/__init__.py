"""Runs an unmodified training script as one rank: `python -m finetune_trainer.script`; see `docs/scripts.md`."""
