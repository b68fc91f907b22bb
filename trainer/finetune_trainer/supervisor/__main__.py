"""Run the supervisor: `python -m finetune_trainer.supervisor`."""

from finetune_trainer.supervisor.main import main

main()
