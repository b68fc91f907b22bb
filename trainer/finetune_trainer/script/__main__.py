"""Entry point of one rank that runs a script: `python -m finetune_trainer.script`, started by the supervisor."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping

from finetune_contract.exit_codes import ExitCode
from finetune_trainer.entry import leave, run_entry
from finetune_trainer.report import Reporter
from finetune_trainer.train.preemption_notice import PreemptionNotice


def main(env: MutableMapping[str, str] = os.environ) -> int:
    """Run the script that the run specification names; return an exit code of the contract."""
    _log_to_stderr()

    def run(notice: PreemptionNotice, reporter: Reporter) -> ExitCode:
        from finetune_trainer.script.launch import run_script  # noqa: PLC0415
        from finetune_trainer.train.context import read_context  # noqa: PLC0415

        return run_script(read_context(env, notice, reporter, lambda _: None), env)

    return run_entry(env, run, "the script failed")


def _log_to_stderr() -> None:
    """Log the trainer's own messages. The root logger is left to the script, which configures it."""
    logger = logging.getLogger("finetune_trainer")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


if __name__ == "__main__":
    leave(main())
