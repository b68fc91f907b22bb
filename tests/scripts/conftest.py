"""Fixtures of the tests of scripts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from testing.trainer.script_ranks import ScriptRanks
from testing.trainer.scripts import script_spec

# Set before torch is imported, in this process and in every rank.
os.environ["OMP_NUM_THREADS"] = "1"

ARGS = {"max_train_steps": 12, "checkpointing_steps": 5, "seed": 1, "use_ema": True, "checkpoints_total_limit": 2}

Undisturbed = Callable[[int], ScriptRanks]


@pytest.fixture(scope="session", name="undisturbed")
def _undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Return the undisturbed run with a number of ranks; it runs once."""
    runs: dict[int, ScriptRanks] = {}

    def run(world_size: int) -> ScriptRanks:
        if world_size not in runs:
            folder = tmp_path_factory.mktemp("undisturbed")
            args = {**ARGS, "log_batches": str(folder / "batches")}
            ranks = ScriptRanks(script_spec("train_style.py", args), folder / "run", world_size=world_size)
            assert ranks.run() == [0] * world_size, ranks.stderr()
            runs[world_size] = ranks
        return runs[world_size]

    return run


@pytest.fixture(name="args")
def _args(tmp_path: Path) -> dict[str, Any]:
    return {**ARGS, "log_batches": str(tmp_path / "batches")}
