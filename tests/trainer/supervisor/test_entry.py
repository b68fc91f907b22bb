"""What all entry points of a rank share: reports of waits, and exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from finetune_contract import environment
from finetune_contract.exit_codes import ExitCode

WAITING = """
import os
from finetune_contract.exit_codes import ExitCode
from finetune_trainer import entry, patience

failures = [ConnectionRefusedError(111, "Connection refused")]

def connect():
    if failures:
        raise failures.pop()

def run(notice, reporter):
    patience.wait_out("fetching the requirements", connect)
    {end}

entry.leave(entry.run_entry(os.environ, run, "the work failed"))
"""


@pytest.mark.parametrize(
    ("end", "code", "state", "line"),
    [
        ("return ExitCode.DONE", ExitCode.DONE, "Done", ""),
        ("return ExitCode.SAVED", ExitCode.SAVED, "Saved", ""),
        ("raise ValueError('bad')", ExitCode.SOFTWARE, "Failed", "the work failed"),
        ("raise OSError(28, 'No space left on device')", ExitCode.STORAGE_OUTAGE, "Failed", "No space left"),
    ],
)
def test_waits_and_ends_are_reported(end: str, code: ExitCode, state: str, line: str) -> None:
    read, write = os.pipe()
    env = {**os.environ, environment.REPORT_FD: str(write), "RANK": "0"}
    command = [sys.executable, "-c", WAITING.format(end=end)]
    ended = subprocess.run(command, env=env, pass_fds=(write,), capture_output=True, text=True, check=False)
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as pipe:
        reports = [json.loads(each) for each in pipe]
    assert ended.returncode == code, ended.stderr
    details = [report.get("detail") for report in reports]
    assert any((each or "").startswith("fetching the requirements failed (") for each in details), details
    assert reports[-1]["state"] == state
    assert line in ended.stderr
