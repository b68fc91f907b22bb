"""Tests of aspect-ratio buckets: each image is cropped to the nearest shape, and each batch has a single shape."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from finetune_contract.exit_codes import ExitCode
from finetune_trainer.data.images.decoding import CENTRE, crop_of, micro_conditioning
from finetune_trainer.data.prefetch import Prefetcher
from finetune_trainer.data.sampling.order import SampleRef
from finetune_trainer.data.sampling.shapes import Shapes
from finetune_trainer.errors import ConfigError
from finetune_trainer.train.checks import check_spec
from testing.trainer import tiny
from testing.trainer.methods import SETTINGS
from tests.trainer.methods.test_methods import read_outputs, run_here

pytestmark = pytest.mark.trainer

RESOLUTION = 32
SIZES = [(32, 16), (16, 32), (20, 20), (32, 17), (24, 16), (16, 16), (40, 20)]


@pytest.fixture(scope="module", autouse=True)
def _restored_settings() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
    gc.unfreeze()


@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([16, 64, 512, 768, 1024]))
def test_each_image_gets_a_shape_that_the_model_supports(width: int, height: int, resolution: int) -> None:
    shape = Shapes(resolution, buckets=True).of((width, height))
    assert shape[0] % 8 == shape[1] % 8 == 0
    assert shape[0] * shape[1] <= resolution**2
    assert shape[0] * shape[1] >= 0.7 * resolution**2
    crop = crop_of((width, height), shape, CENTRE)
    assert crop.width >= shape[0]
    assert crop.height >= shape[1]
    assert crop.width == shape[0] or crop.height == shape[1]
    assert Shapes(resolution).of((width, height)) == (resolution, resolution)


def test_shapes_include_the_usual_ones_of_sdxl() -> None:
    shapes = Shapes(1024, buckets=True)
    for shape in ((1024, 1024), (1152, 896), (896, 1152), (1216, 832), (1344, 768), (768, 1344)):
        assert shape in shapes.all
        assert shapes.of(shape) == shape
    assert shapes.of((4000, 3000)) == (1152, 896)


def test_micro_conditioning_has_the_shape() -> None:
    assert micro_conditioning((3000, 2000), (1216, 832), CENTRE).tolist() == [2000, 3000, 0, 16, 832, 1216]


class _Batches:
    latents = text = None

    def shape(self, index: int) -> tuple[int, int]:
        return SIZES[index]


def test_each_batch_has_a_single_shape() -> None:
    refs = [SampleRef(epoch, index) for epoch in range(3) for index in range(len(SIZES))]
    parts = Prefetcher(_Batches()).split(refs, 2)  # type: ignore[arg-type]
    assert sorted((ref.epoch, ref.index) for part in parts for ref in part) == [(r.epoch, r.index) for r in refs]
    assert all(len(part) <= 2 and len({SIZES[ref.index] for ref in part}) == 1 for part in parts)


def test_images_of_different_shapes_train_and_resume(bases: dict[str, Path], tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    random = np.random.default_rng(0)
    rows = []
    for number, (width, height) in enumerate(SIZES):
        for name in (f"{number}.png", f"edges-{number}.png"):
            Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(data / name)
        rows.append({"file_name": f"{number}.png", "text": f"picture {number}", "edges": f"edges-{number}.png"})
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert len({Shapes(RESOLUTION, buckets=True).of(size) for size in SIZES}) > 1
    options = {"aspectBuckets": True, "steps": 4, "randomFlip": True, "resolution": RESOLUTION}
    spec = tiny.make_spec(bases["sdxl"], data, **options, **SETTINGS["ControlNet"])
    assert run_here(spec, tmp_path / "uninterrupted") is ExitCode.DONE
    assert run_here(spec, tmp_path / "resumed", stop_at=2) is ExitCode.SAVED
    assert run_here(spec, tmp_path / "resumed", attempt=2) is ExitCode.DONE
    assert read_outputs(tmp_path / "resumed") == read_outputs(tmp_path / "uninterrupted")
    square = tiny.make_spec(bases["sdxl"], data, **{**options, "aspectBuckets": False}, **SETTINGS["ControlNet"])
    assert run_here(square, tmp_path / "square") is ExitCode.DONE
    assert read_outputs(tmp_path / "square") != read_outputs(tmp_path / "uninterrupted")


def test_class_images_refuse_aspect_buckets(base: Path, data: Path) -> None:
    spec = tiny.make_spec(base, data, aspectBuckets=True, **SETTINGS["DreamBooth"])
    with pytest.raises(ConfigError, match=r"training\.aspectBuckets: class images are square"):
        check_spec(spec)
