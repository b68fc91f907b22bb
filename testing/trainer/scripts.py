"""Run specifications of jobs with a script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune_contract.run_spec import RunSpec

PROGRAMS = Path(__file__).parents[2] / "tests" / "scripts" / "programs"
"""Scripts in the usual style."""


def script_spec(program: str | Path, args: dict[str, Any] | list[str], script: Any = None, **run: Any) -> RunSpec:
    """Return the specification of a run.

    Args:
        program: name of a script in PROGRAMS, or a path.
        args: its command line.
        script: further fields of training.script.
        run: further fields of the run.
    """
    path = PROGRAMS / program
    return RunSpec.model_validate(
        {
            "namespace": "default",
            "job": "script",
            "uid": "0123456789abcdef",
            "model": {"base": "none"},
            "dataset": {"source": "none"},
            "training": {"script": {"path": str(path), "args": args, **(script or {})}},
            "globalBatch": 2,
            **run,
        }
    )
