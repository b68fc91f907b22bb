"""Fixtures of the trainer's tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Set before torch is imported, in this process and in every rank.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the tiny base model."""
    from testing.trainer import tiny  # noqa: PLC0415  slow to import

    return tiny.write_base(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="session")
def bases(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folders of a tiny base model of each family, by family."""
    from testing.trainer import tiny  # noqa: PLC0415  slow to import

    folder = tmp_path_factory.mktemp("families")
    others = {family: tiny.write_base(folder / family, family=family) for family in tiny.FAMILIES if family != "sd1"}
    return {"sd1": base, **others}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the tiny data set."""
    from testing.trainer import tiny  # noqa: PLC0415  slow to import

    return tiny.write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(name="restored")
def _restored() -> Iterator[None]:
    """Undo the process-wide settings of a rank that runs in this process."""
    import torch  # noqa: PLC0415  slow to import

    yield
    torch.use_deterministic_algorithms(False)
    gc.unfreeze()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
