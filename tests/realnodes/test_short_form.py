"""The short form of `make cluster-test`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from testing.realnodes.faults import SHORT

ROOT = Path(__file__).parents[2]


@pytest.mark.trainer
@pytest.mark.timeout(1200)
def test_jobs_recover_from_faults_on_real_nodes() -> None:
    command = [sys.executable, "-m", "testing.realnodes", "--short"]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "KUBECONFIG": ""}, capture_output=True, text=True, check=False
    )
    if result.stderr.startswith("SKIPPED: "):
        pytest.skip(result.stderr.splitlines()[0])
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    result_line = json.loads(result.stdout.splitlines()[-1])
    assert (result_line["faults"], result_line["wrong"]) == (len(SHORT), 0)
