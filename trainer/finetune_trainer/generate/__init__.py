"""Pictures from everything that a job writes, as one grid. `finetune generate` starts it."""
