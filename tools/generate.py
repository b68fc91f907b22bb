"""Write what is generated from the models: the CRD and the reference. With --check only show the difference.

Run by `make generate` and, with --check, by `make verify`.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable
from pathlib import Path

from finetune_operator.api import crd, reasons, reference

ROOT = Path(__file__).resolve().parents[1]
TROUBLESHOOTING = "docs/troubleshooting.md"
GENERATED: dict[str, Callable[[], str]] = {
    crd.FILE: crd.render,
    # Helm reads no file outside of its chart.
    "charts/finetune-operator/files/crd.yaml": crd.render,
    reference.JOB_FILE: reference.render_job,
    reference.REASONS_FILE: reference.render_reasons,
}
"""Each generated file, relative to the repository, and what writes its text."""


def write(root: Path) -> None:
    """Write the files that differ."""
    for name, render in GENERATED.items():
        path, text = root / name, render()
        if _read(path) != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {name}")


def differences(root: Path) -> str:
    """The unified difference between what is committed and what would be written; empty where there is none."""
    lines: list[str] = []
    for name, render in GENERATED.items():
        committed, generated = _read(root / name), render()
        lines += difflib.unified_diff(
            committed.splitlines(keepends=True), generated.splitlines(keepends=True), name, f"{name} (generated)"
        )
    return "".join(lines)


def untold_reasons(root: Path) -> list[str]:
    """Reasons that a person can meet and docs/troubleshooting.md has no section on."""
    told = set(re.findall(r"^### (\w+)$", _read(root / TROUBLESHOOTING), re.MULTILINE))
    return [reason.value for reason in reasons.REASONS if reason.value not in told]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def main() -> int:
    """Write or compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing; exit 1 on a difference")
    if not parser.parse_args().check:
        write(ROOT)
        return 0
    if untold := untold_reasons(ROOT):
        print(f"{TROUBLESHOOTING}: write a section '### <reason>' on {', '.join(untold)}", file=sys.stderr)
        return 1
    if difference := differences(ROOT):
        sys.stdout.write(difference)
        print("generated files differ: run `make generate` and commit what it writes", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
