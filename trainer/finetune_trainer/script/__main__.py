"""Entry point of one rank that runs a script: `python -m finetune_trainer.script`, started by the supervisor."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
from collections.abc import MutableMapping

from finetune_contract import environment
from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import RankState
from finetune_trainer import libraries
from finetune_trainer.errors import RankError
from finetune_trainer.outages import exit_code_of
from finetune_trainer.report import Reporter
from finetune_trainer.train.preemption_notice import PreemptionNotice

_LOG = logging.getLogger("finetune_trainer.script")


def main(env: MutableMapping[str, str] = os.environ) -> int:
    """Run the script that the run specification names; return an exit code of the contract."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    _log_to_stderr()
    fd = env.get(environment.REPORT_FD)
    reporter = Reporter(int(env.get("RANK", "0")), int(fd) if fd else None)
    notice = PreemptionNotice(on_leave=lambda: reporter.state(RankState.SAVED))
    notice.listen()
    reporter.state(RankState.STARTING)
    libraries.prepare(env)
    try:
        # These imports take seconds. A preemption notice can interrupt them.
        from finetune_trainer.script.launch import run_script  # noqa: PLC0415
        from finetune_trainer.train.context import read_context  # noqa: PLC0415

        code = run_script(read_context(env, notice, reporter, lambda _: None), env)
    except RankError as error:
        notice.hold()
        reporter.state(RankState.FAILED)
        _LOG.error("%s", error)
        return exit_code_of(error, error.code)
    except Exception as error:
        notice.hold()
        reporter.state(RankState.FAILED)
        _LOG.exception("the script failed")
        return exit_code_of(error, ExitCode.SOFTWARE)
    reporter.state(RankState.SAVED if code is ExitCode.SAVED else RankState.DONE)
    return code


def _log_to_stderr() -> None:
    """Log the trainer's own messages. The root logger is left to the script, which configures it."""
    logger = logging.getLogger("finetune_trainer")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # The regular teardown of torch takes up to a second, and its process groups wait for other ranks.
    os._exit(code)
