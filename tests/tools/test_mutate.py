"""The mutation check: its tables are complete, and a sample of the removals is noticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tools import mutate

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = 6
"""Removals in `make test`; `make mutate` runs all."""


def test_every_table_has_removals() -> None:
    removals = mutate.removals()
    assert {removal.table for removal in removals} == {"policies", "causes", "rules", "edits", "unsupported"}
    assert len(removals) >= 40
    assert len({removal.label for removal in removals}) == len(removals)


def test_a_removal_reaches_every_reference(tmp_path: Path) -> None:
    """Runs in a separate process, because a removal is permanent."""
    script = (
        "from tools import mutate\n"
        "from finetune_operator.api import validate\n"
        "from finetune_operator.plan import core, registry\n"
        "(wake,) = [removal for removal in mutate.removals() if removal.name == 'stragglers.wake']\n"
        "before = registry.POLICIES\n"
        "wake.apply()\n"
        "(old,) = [policy for policy in before if policy.name == 'stragglers']\n"
        "(new,) = [policy for policy in registry.POLICIES if policy.name == 'stragglers']\n"
        "assert (new.wake is not old.wake, new.decide is old.decide) == (True, True)\n"
        "assert len(registry.POLICIES) == len(before)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_sample_of_removals_is_noticed() -> None:
    command = [sys.executable, "-m", "tools.mutate", "--sample", str(SAMPLE), "--workers", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == {"removed": SAMPLE, "unnoticed": 0}
