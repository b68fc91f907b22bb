"""Fixtures of the tests with OpenVINO."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class TrainedJob:
    """A job that has trained a LoRA of SD 1.x for two steps.

    Attributes:
        run: file with its run specification.
        job_dir: its folder, with one checkpoint.
        cache: folder shared by all jobs.
    """

    run: Path
    job_dir: Path
    cache: Path


@pytest.fixture(scope="session")
def trained(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> TrainedJob:
    """Return a job whose rank has run in this process."""
    from finetune_contract.exit_codes import ExitCode  # noqa: PLC0415  slow to import
    from finetune_trainer.report import Reporter  # noqa: PLC0415
    from finetune_trainer.train.context import RankContext  # noqa: PLC0415
    from finetune_trainer.train.preemption_notice import PreemptionNotice  # noqa: PLC0415
    from finetune_trainer.train.run import run_rank  # noqa: PLC0415
    from testing.trainer import tiny  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("trained")
    spec = tiny.make_spec(bases["sd1"], tiny.write_data(folder / "data"), steps=2, learningRate=1)
    job = TrainedJob(folder / "run.json", folder / "job", folder / "cache")
    job.run.write_text(spec.to_json(), encoding="utf-8")
    context = RankContext(spec, 1, job.job_dir, job.cache, PreemptionNotice(), Reporter(0, None))
    assert run_rank(context, {"OMP_NUM_THREADS": "1"}) is ExitCode.DONE
    return job
