"""Entry point of one rank: `python -m finetune_trainer.rank`, started by the supervisor with torch's variables."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable, Mapping

from finetune_contract.exit_codes import ExitCode
from finetune_trainer.entry import leave, run_entry
from finetune_trainer.phases import Phases, StartPhase
from finetune_trainer.report import Reporter
from finetune_trainer.train.preemption_notice import PreemptionNotice


def main(env: Mapping[str, str] = os.environ, on_save_stage: Callable[[str], None] = lambda _: None) -> int:
    """Run the rank that the environment describes.

    Args:
        env: torch's variables and those of `finetune_contract.environment`.
        on_save_stage: see CheckpointStore.

    Returns:
        An exit code of the contract.
    """
    # Imports create hundreds of thousands of permanent objects. Collecting garbage among them takes a second.
    gc.disable()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    phases = Phases.of(env)

    def run(notice: PreemptionNotice, reporter: Reporter) -> ExitCode:
        from finetune_trainer.train.context import read_context  # noqa: PLC0415
        from finetune_trainer.train.run import run_rank  # noqa: PLC0415

        context = read_context(env, notice, reporter, on_save_stage, phases)
        phases.end(StartPhase.IMPORTS)
        return run_rank(context, env)

    return run_entry(env, run, "unexpected error in the trainer")


if __name__ == "__main__":
    leave(main())
