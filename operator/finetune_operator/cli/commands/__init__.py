"""One subcommand of `finetune` per file."""
