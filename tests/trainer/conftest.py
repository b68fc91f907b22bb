"""Fixtures of the trainer's tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported, here and in every rank.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model."""
    from testing.trainer import tiny  # noqa: PLC0415  slow to import

    return tiny.write_base(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="session")
def bases(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny base of each family."""
    from testing.trainer import tiny  # noqa: PLC0415  slow to import

    folder = tmp_path_factory.mktemp("families")
    others = {family: tiny.write_base(folder / family, family=family) for family in tiny.FAMILIES if family != "sd1"}
    return {"sd1": base, **others}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data set."""
    from testing.trainer import tiny  # noqa: PLC0415  slow to import

    return tiny.write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(name="restored")
def _restored() -> Iterator[None]:
    """For a rank in this process: what it sets for a whole process is undone."""
    import torch  # noqa: PLC0415  slow to import

    yield
    torch.use_deterministic_algorithms(False)
    gc.unfreeze()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
