"""Short forms of the long checks: the same programs, fewer rounds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def last_line(*command: str) -> dict[str, Any]:
    """Run a long check; return the JSON of its last line."""
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


@pytest.mark.trainer
@pytest.mark.timeout(900)
def test_kill_demo() -> None:
    result = last_line("bench.kill_demo", "--notices", "1", "--kills", "3", "--steps", "12", "--save-every", "3")
    assert result == {"notices": 1, "kills": 3, "different_weights": 0, "lost_after_notice": 0}
