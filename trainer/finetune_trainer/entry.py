"""What every entry point of a rank does, whether it trains a method (`rank`) or runs a script (`script`).

Handles SIGTERM before slow imports, and turns every result into an exit code of the contract.
"""

from __future__ import annotations

import faulthandler
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
from finetune_trainer.report import Reporter
from finetune_trainer.train.preemption_notice import PreemptionNotice

_LOG = logging.getLogger(__name__)


def run_entry(env: Mapping[str, str], run: Callable[[PreemptionNotice, Reporter], ExitCode], what_failed: str) -> int:
    """Run a rank, and report its states.

    Args:
        env: torch's variables and those of `finetune_contract.environment`.
        run: the work of the rank, with its slow imports; a preemption notice can interrupt them.
        what_failed: log line for an error that is not expected.

    Returns:
        An exit code of the contract.
    """
    # The supervisor requests the stacks of all threads in the log before it ends a rank that hangs.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    fd = env.get(environment.REPORT_FD)
    reporter = Reporter(int(env.get("RANK", "0")), int(fd) if fd else None)
    notice = PreemptionNotice(on_leave=lambda: reporter.state(RankState.SAVED))
    notice.listen()
    patience.report_to(reporter.waiting)
    patience.pause_with(notice.pause)
    reporter.state(RankState.STARTING)
    libraries.prepare(env)
    try:
        code = run(notice, reporter)
    except RankError as error:
        notice.hold()
        reporter.state(RankState.FAILED)
        _LOG.error("%s", error)
        return exit_code_of(error, error.code)
    except Exception as error:
        notice.hold()
        reporter.state(RankState.FAILED)
        _LOG.exception(what_failed)
        return exit_code_of(error, ExitCode.SOFTWARE)
    reporter.state(RankState.SAVED if code is ExitCode.SAVED else RankState.DONE)
    return code


def leave(code: int) -> None:
    """End the process without the regular teardown of torch: it takes up to a second and can wait for other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
