"""The README's test command runs every test file of the repository.

pytest skips folders silently: those in `norecursedirs`, for example one named `build`, and those outside `testpaths`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 240.0


@pytest.fixture(scope="module")
def collected() -> dict[str, int]:
    """Return the number of tests that pytest collects without arguments, by file."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-qq", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)
    assert result.returncode == 0, result.stdout + result.stderr
    # With -qq, pytest prints one line per file: "tests/api/test_job.py: 12".
    lines = (line.rpartition(": ") for line in result.stdout.splitlines() if line.startswith("tests/"))
    return {path: int(number) for path, _, number in lines}


def test_the_test_command_has_no_arguments_that_select_tests() -> None:
    """`make test`, the command in the README, must run the collection that the next test checks."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = makefile.partition("\ntest:")[2].partition("\n\n")[0]
    [command] = [line.split() for line in recipe.splitlines() if "/pytest" in line]
    assert command[0] == "$(BIN)/pytest"
    assert command[1:] == ["--numprocesses", "2", "--dist", "loadgroup"], "a selection of tests skips the others"


def test_every_test_file_is_collected(collected: dict[str, int]) -> None:
    command = ["git", "ls-files", "--", "tests/**/test_*.py", "tests/test_*.py"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    files = [name for name in sorted(set(listed)) if (ROOT / name).is_file()]
    assert len(files) > 100, "git lists fewer test files than the repository has"
    missing = [name for name in files if not collected.get(name)]
    assert missing == [], f"pytest collects no test from {', '.join(missing)}; check norecursedirs and testpaths"
