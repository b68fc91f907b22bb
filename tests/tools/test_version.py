"""The version is defined once."""

from __future__ import annotations

import re
import subprocess
from importlib.metadata import version
from pathlib import Path

from finetune_contract import __version__
from tools import generate

ROOT = Path(__file__).resolve().parents[2]
DEFINITION = "trainer/finetune_contract/__init__.py"
FREE = re.compile(r"^(CHANGELOG\.md|RELEASE\.md|requirements/.*|.*/go\.(mod|sum)|tests/golden/.*\.txt)$")
"""Files that may contain the digits of the version for other reasons: history, locks, recorded output."""


def test_the_distribution_has_this_version() -> None:
    assert version("finetune-operator") == __version__


def test_no_other_file_defines_the_version() -> None:
    literal = re.compile(rf"(?<![\d.v]){re.escape(__version__)}(?![\d.])")
    stamped = {str(path.relative_to(ROOT)) for pattern in generate.STAMPED for path in ROOT.glob(pattern)}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    found = []
    for name in tracked:
        path = ROOT / name
        if name == DEFINITION or name in stamped or FREE.match(name) or not path.is_file():
            continue
        if literal.search(path.read_bytes().decode(errors="ignore")):
            found.append(name)
    assert not found, f"these files repeat the version: read it from finetune_contract or add them to STAMPED: {found}"


def test_stamp_replaces_only_the_version() -> None:
    text = "apiVersion: v2\nversion: 9.9.9\nappVersion: 9.9.9\n"
    pattern = generate.STAMPED["charts/finetune-operator/Chart.yaml"]
    assert generate.stamp(text, pattern) == f"apiVersion: v2\nversion: {__version__}\nappVersion: {__version__}\n"
