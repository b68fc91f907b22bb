"""Fixtures of the tests with IPEX."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

# Set before torch is imported, in this process and in every rank.
os.environ["OMP_NUM_THREADS"] = "1"

HAS_IPEX = importlib.util.find_spec("intel_extension_for_pytorch") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need IPEX where it is not installed."""
    for item in items:
        if not HAS_IPEX and item.get_closest_marker("ipex"):
            item.add_marker(pytest.mark.skip(reason="IPEX is not installed here"))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the tiny base model."""
    from testing.trainer import tiny  # noqa: PLC0415  slow to import

    return tiny.write_base(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the tiny data set."""
    from testing.trainer import tiny  # noqa: PLC0415  slow to import

    return tiny.write_data(tmp_path_factory.mktemp("data") / "data")
