"""Broken images are counted, named, and left out up to a limit; what was found is remembered by content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from finetune_contract.exit_codes import ExitCode
from finetune_contract.spec import DatasetSpec
from finetune_trainer.data.cache import encode, store
from finetune_trainer.data.cache.hashes import FileHashes
from finetune_trainer.data.images import decoding
from finetune_trainer.data.images.scan import ImageScan, KeptSource, describe_broken, scan_images
from finetune_trainer.data.sources.base import Source
from finetune_trainer.data.sources.open_source import open_source
from finetune_trainer.distributed.world import World
from testing.trainer import tiny
from testing.trainer.ranks import Ranks

pytestmark = pytest.mark.trainer

ALONE = World(0, 1, 0, torch.device("cpu"))


def look(source: Source, folder: Path) -> ImageScan:
    hashes = FileHashes(folder / "hashes.json")
    return scan_images(len(source), source.open, folder, hashes, ALONE, lambda *_: None)


@pytest.fixture(name="damaged")
def _damaged(tmp_path: Path) -> Path:
    """Of the seven training images one is cut short, one is a text, one is not there, one has a broken condition."""
    folder = tiny.write_data(tmp_path / "damaged")
    train = folder / "train"
    (train / "1.png").write_bytes((train / "1.png").read_bytes()[:200])
    (train / "3.png").write_text("a picture", encoding="utf-8")
    (train / "4.png").unlink()
    (train / "edges-6.png").write_bytes(b"")
    return folder


def test_a_census_opens_each_shard_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many images there are: what a later attempt reads again is on its way to the next step."""
    (tmp_path / "data").mkdir()
    for side in range(1, 41):
        Image.new("RGB", (side, 5)).save(tmp_path / "data" / f"{side}.png")
    source = open_source(DatasetSpec(source=str(tmp_path / "data")), "train", needs_captions=False)
    monkeypatch.setattr(encode, "SHARD_ITEMS", 8)
    expected = look(source, tmp_path).sizes.tolist()

    opened: list[Path] = []

    def open_shard(shard: Path, framework: str) -> Any:
        opened.append(shard)
        return safe_open(shard, framework)

    monkeypatch.setattr(store, "safe_open", open_shard)
    monkeypatch.setattr(store, "MAX_OPEN", 2)
    assert look(source, tmp_path).sizes.tolist() == expected
    # Once for what is in it, once for the sizes.
    assert [opened.count(shard) for shard in set(opened)] == [2] * 5


def test_sizes_are_those_that_are_seen(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    upright = Image.new("RGB", (6, 9))
    exif = upright.getexif()
    exif[0x0112] = 6
    upright.save(tmp_path / "data" / "0.jpg", exif=exif)
    Image.new("RGB", (5, 5)).save(tmp_path / "data" / "1.png")
    source = open_source(DatasetSpec(source=str(tmp_path / "data")), "train", needs_captions=False)
    census = look(source, tmp_path)
    assert census.sizes.tolist() == [[9, 6], [5, 5]]
    assert census.broken == []
    assert not census.all_square
    assert census.without([0]).all_square


def test_broken_images_are_found_and_remembered(damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(DatasetSpec(source=str(damaged)), "train")
    census = look(source, tmp_path)
    assert census.broken == [1, 3, 4]
    assert describe_broken(source, census.broken).startswith("dataset.source: 3 of 7 images are broken: ")
    monkeypatch.setattr(decoding, "decode", lambda _: pytest.fail("decoded again"))
    assert np.array_equal(look(source, tmp_path).sizes, census.sizes)


def test_the_others_keep_their_own_samples(damaged: Path) -> None:
    source = open_source(DatasetSpec(source=str(damaged)), "train")
    kept = KeptSource(source, [1, 3, 4])
    assert [kept.caption(index) for index in range(len(kept))] == [f"picture {number}" for number in (0, 2, 5, 6)]
    assert kept.file(1) == damaged / "train" / "2.png"
    assert kept.name(1) == source.name(2)


def test_training_goes_on_without_as_many_as_are_allowed(base: Path, damaged: Path, tmp_path: Path) -> None:
    spec = tiny.make_spec(base, damaged, method="ControlNet", steps=1)
    refused = Ranks(spec, tmp_path / "refused")
    assert refused.run() == [ExitCode.DATA]
    last = refused.stderr().splitlines()[-1]
    assert last.startswith("dataset.source: 4 of 7 images are broken: ")
    assert last.endswith("dataset.maxBroken allows 0: mend or remove them, or write maxBroken: 4")
    allowed = spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"max_broken": 4})})
    ranks = Ranks(allowed, tmp_path / "allowed", world_size=2)
    assert ranks.run() == [ExitCode.DONE] * 2, ranks.stderr()
    (warning,) = ranks.reports()[-1]["warnings"]
    assert "1.png" in warning
    assert warning.endswith("training goes on without")
    json.dumps(ranks.reports(1)[-1])
