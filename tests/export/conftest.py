"""Fixtures of the tests with OpenVINO."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

HAS_OPENVINO = importlib.util.find_spec("openvino") is not None
NUM_TOKENS = 16
"""Length of the prompts: optimum-intel traces text encoders with 16 tokens."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need OpenVINO where it is not installed."""
    for item in items:
        if not HAS_OPENVINO and item.get_closest_marker("openvino"):
            item.add_marker(pytest.mark.skip(reason="OpenVINO is not installed here"))


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Return the folders of a tiny base model of two families, by family."""
    from testing.trainer import tiny  # noqa: PLC0415  slow to import

    folder = tmp_path_factory.mktemp("families")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "NUM_TOKENS", NUM_TOKENS)
        yield {family: tiny.write_base(folder / family, family=family) for family in ("sd1", "sdxl")}
