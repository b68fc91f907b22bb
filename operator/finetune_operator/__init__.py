"""The operator: reconciles FineTuneJobs. Imports the contract, never the trainer, never torch."""
