"""Entry point of one rank: `python -m finetune_trainer.rank`, started by the supervisor with torch's variables.

Handles SIGTERM before slow imports, and turns every result into an exit code of the contract.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping

from finetune_contract import environment
from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import RankState
from finetune_trainer import libraries, patience
from finetune_trainer.errors import RankError
from finetune_trainer.outages import exit_code_of
from finetune_trainer.phases import Phases, StartPhase
from finetune_trainer.report import Reporter
from finetune_trainer.train.preemption_notice import PreemptionNotice

_LOG = logging.getLogger(__name__)


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
    # The supervisor requests the stacks of all threads in the log before it ends a rank that hangs.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    fd = env.get(environment.REPORT_FD)
    reporter = Reporter(int(env.get("RANK", "0")), int(fd) if fd else None)
    notice = PreemptionNotice(on_leave=lambda: reporter.state(RankState.SAVED))
    notice.listen()
    patience.report_to(reporter.waiting)
    patience.pause_with(notice.pause)
    reporter.state(RankState.STARTING)
    libraries.prepare(env)
    phases = Phases.of(env)
    try:
        # These imports take seconds. A preemption notice can interrupt them.
        from finetune_trainer.train.context import read_context  # noqa: PLC0415
        from finetune_trainer.train.run import run_rank  # noqa: PLC0415

        context = read_context(env, notice, reporter, on_save_stage, phases)
        phases.end(StartPhase.IMPORTS)
        code = run_rank(context, env)
    except RankError as error:
        notice.hold()
        reporter.state(RankState.FAILED)
        _LOG.error("%s", error)
        return exit_code_of(error, error.code)
    except Exception as error:
        notice.hold()
        reporter.state(RankState.FAILED)
        _LOG.exception("unexpected error in the trainer")
        return exit_code_of(error, ExitCode.SOFTWARE)
    reporter.state(RankState.SAVED if code is ExitCode.SAVED else RankState.DONE)
    return code


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # The regular teardown of torch takes up to a second and has no effect on the result.
    os._exit(code)
