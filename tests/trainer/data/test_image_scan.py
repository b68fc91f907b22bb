"""Tests of the image scan: broken images are named and skipped up to a limit; results are cached by content."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from finetune_contract.exit_codes import ExitCode
from finetune_contract.input_spec import DatasetSpec
from finetune_trainer.data.cache import encode, store
from finetune_trainer.data.cache.image_scan import ImageScan, describe_broken, scan_images
from finetune_trainer.data.hashes import FileHashes
from finetune_trainer.data.images import decoding
from finetune_trainer.data.sources.base import SampleSource
from finetune_trainer.data.sources.open import open_source
from finetune_trainer.data.sources.subset import KeptSource
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import DataError
from testing.trainer import streams, tiny
from testing.trainer.ranks import Ranks

pytestmark = pytest.mark.trainer

SINGLE_RANK = World(0, 1, 0, torch.device("cpu"))


def scan_source(source: SampleSource, folder: Path) -> ImageScan:
    hashes = FileHashes(folder / "hashes.json")
    return scan_images(len(source), source.open, folder, hashes, SINGLE_RANK, lambda *_: None)


@pytest.fixture(name="damaged")
def _damaged(tmp_path: Path) -> Path:
    """A data set of seven images: one is truncated, one is a text, one is missing, one has a broken condition."""
    folder = tiny.write_data(tmp_path / "damaged")
    train = folder / "train"
    (train / "1.png").write_bytes((train / "1.png").read_bytes()[:200])
    (train / "3.png").write_text("a picture", encoding="utf-8")
    (train / "4.png").unlink()
    (train / "edges-6.png").write_bytes(b"")
    return folder


def test_scan_opens_each_shard_once_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a later attempt's scan delays its first step, so it must not open shards repeatedly."""
    (tmp_path / "data").mkdir()
    for side in range(1, 41):
        Image.new("RGB", (side, 5)).save(tmp_path / "data" / f"{side}.png")
    source = open_source(DatasetSpec(source=str(tmp_path / "data")), "train", needs_captions=False)
    monkeypatch.setattr(encode, "SHARD_ITEMS", 8)
    expected = scan_source(source, tmp_path).sizes.tolist()

    opened: list[Path] = []

    def open_shard(shard: Path, framework: str) -> Any:
        opened.append(shard)
        return safe_open(shard, framework)

    monkeypatch.setattr(store, "safe_open", open_shard)
    monkeypatch.setattr(store, "MAX_OPEN", 2)
    assert scan_source(source, tmp_path).sizes.tolist() == expected
    assert [opened.count(shard) for shard in set(opened)] == [1] * 5


def test_sizes_are_those_of_decoded_images(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    upright = Image.new("RGB", (6, 9))
    exif = upright.getexif()
    exif[0x0112] = 6
    upright.save(tmp_path / "data" / "0.jpg", exif=exif)
    Image.new("RGB", (5, 5)).save(tmp_path / "data" / "1.png")
    source = open_source(DatasetSpec(source=str(tmp_path / "data")), "train", needs_captions=False)
    scan = scan_source(source, tmp_path)
    assert scan.sizes.tolist() == [[9, 6], [5, 5]]
    assert scan.broken == []
    assert not scan.all_square
    assert scan.without([0]).all_square


def test_broken_images_are_found_and_cached(damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(DatasetSpec(source=str(damaged)), "train")
    scan = scan_source(source, tmp_path)
    assert scan.broken == [1, 3, 4]
    assert describe_broken(source, scan.broken).startswith("dataset.source: 3 of 7 images are broken: ")
    monkeypatch.setattr(decoding, "decode", lambda _: pytest.fail("an image was decoded again"))
    assert np.array_equal(scan_source(source, tmp_path).sizes, scan.sizes)


def test_kept_source_maps_indices_to_samples(damaged: Path) -> None:
    source = open_source(DatasetSpec(source=str(damaged)), "train")
    kept = KeptSource(source, [1, 3, 4])
    assert [kept.captions(index) for index in range(len(kept))] == [(f"picture {number}",) for number in (0, 2, 5, 6)]
    assert kept.file(1) == damaged / "train" / "2.png"
    assert kept.name(1) == source.name(2)


def test_training_skips_broken_images_up_to_the_limit(base: Path, damaged: Path, tmp_path: Path) -> None:
    spec = tiny.make_spec(base, damaged, method="ControlNet", steps=1)
    refused = Ranks(spec, tmp_path / "refused")
    assert refused.run() == [ExitCode.DATA]
    last = refused.stderr().splitlines()[-1]
    assert last.startswith("dataset.source: 4 of 7 images are broken: ")
    assert last.endswith("dataset.maxBroken allows 0: replace or remove them, or write maxBroken: 4")
    allowed = spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"max_broken": 4})})
    ranks = Ranks(allowed, tmp_path / "allowed", world_size=2)
    assert ranks.run() == [ExitCode.DONE] * 2, ranks.stderr()
    (warning,) = (each for each in ranks.reports()[-1]["warnings"] if "broken" in each)
    assert "1.png" in warning
    assert warning.endswith("training continues without them")
    assert not ranks.reports(1)[-1].get("warnings"), "rank 0 reports the warning for all ranks"


def test_data_set_with_only_broken_images_is_refused(base: Path, tmp_path: Path) -> None:
    """The message does not recommend a larger `maxBroken`, because no value of it helps."""
    data = tiny.write_data(tmp_path / "data", num_samples=2)
    for number in range(2):
        (data / "train" / f"{number}.png").write_bytes(b"")
    spec = tiny.make_spec(base, data, centerCrop=True)
    spec = spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"max_broken": 2})})
    with pytest.raises(DataError, match=r"dataset\.source: 2 of 2 images are broken: .*; replace them") as refusal:
        streams.prepare(spec, tmp_path / "cache")
    assert "maxBroken" not in str(refusal.value)


def test_images_that_an_older_decoder_could_not_read_are_checked_again(
    damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache of an older release holds its result for them: a size of zero."""
    source = open_source(DatasetSpec(source=str(damaged)), "train")
    decode = decoding.decode

    def older(file: IO[bytes]) -> Image.Image:
        if getattr(file, "name", "").endswith("2.png"):
            raise OSError("unknown format")
        return decode(file)

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "decode", older)
        patch.setattr(decoding, "VERSION", 0)
        assert scan_source(source, tmp_path).broken == [1, 2, 3, 4]
    assert scan_source(source, tmp_path).broken == [1, 3, 4]
    monkeypatch.setattr(decoding, "decode", lambda _: pytest.fail("an image was decoded again"))
    assert scan_source(source, tmp_path).broken == [1, 3, 4]
