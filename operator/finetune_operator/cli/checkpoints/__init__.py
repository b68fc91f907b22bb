"""Reading checkpoints for `finetune checkpoints`: find them, compare them, download them from a bucket."""
