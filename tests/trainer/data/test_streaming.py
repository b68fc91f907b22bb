"""Tests of streaming: training equals that on a copied data set, and no image of the source is kept."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from finetune_contract.exit_codes import ExitCode
from finetune_contract.input_spec import Columns, DatasetSpec
from finetune_trainer.data.batches import Batch, BatchMaker
from finetune_trainer.data.cache.encode import SHARD_ITEMS
from finetune_trainer.data.cache.stream_map import RowShare
from finetune_trainer.data.images import decoding
from finetune_trainer.data.sampling.order import SampleRef
from finetune_trainer.data.sources.open import open_stream
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import ConfigError, DataError
from finetune_trainer.train.checks import check_spec
from testing.measure.memory import peak_bytes, reset_peak
from testing.measure.process import call_in_new_process
from testing.objectstore.server import ObjectStore
from testing.trainer import streams, tiny
from testing.trainer.ranks import Ranks

pytestmark = pytest.mark.trainer

Writer = Callable[[Path, Path], Path]
SOURCES: dict[str, Writer] = {
    "folder": lambda _, data: data,
    "jsonl": lambda _, data: data / "train" / "metadata.jsonl",
    "parquet": lambda folder, data: streams.write_parquet(folder / "some.parquet", streams.rows_of(data)),
    "hub": lambda folder, data: streams.write_hub_folder(folder / "hub", data),
    "tar": lambda folder, data: streams.write_tar(folder / "some.tar", streams.rows_of(data)),
}
COLUMNS = {"tar": Columns(image="png", caption="txt")}


def batch_of(maker: BatchMaker) -> Batch:
    return maker.make([SampleRef(epoch, index) for epoch in (0, 1) for index in range(len(maker.source))])


def assert_equal(one: Batch, other: Batch) -> None:
    for field in dataclasses.fields(Batch):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if isinstance(left, torch.Tensor):
            assert torch.equal(left, right), field.name
        elif isinstance(left, dict):
            assert all(torch.equal(left[name], right[name]) for name in left | right), field.name
        else:
            assert left == right, field.name


@pytest.mark.parametrize("kind", SOURCES)
def test_streamed_batches_equal_those_of_the_copy(kind: str, base: Path, data: Path, tmp_path: Path) -> None:
    spec = tiny.make_spec(base, data, centerCrop=True, randomFlip=True)
    source = SOURCES[kind](tmp_path, data)
    spec = streams.streamed(spec, source, columns=COLUMNS.get(kind, Columns()), streaming=False)
    plain = batch_of(streams.prepare(spec, tmp_path / "plain").batches)
    reports: list[str] = []
    cache = tmp_path / "streamed"
    assert_equal(batch_of(streams.prepare(streams.streamed(spec), cache, reports).batches), plain)
    assert f"{tiny.NUM_SAMPLES} images read" in reports
    assert_nothing_kept(cache, data)
    second: list[str] = []
    assert_equal(batch_of(streams.prepare(streams.streamed(spec), cache, second).batches), plain)
    assert not any("images read" in text for text in second)


def assert_nothing_kept(cache: Path, data: Path) -> None:
    pictures = [path.read_bytes() for path in (data / "train").glob("[0-9]*.png")]
    kept = [path.read_bytes() for path in cache.rglob("*") if path.is_file()]
    assert pictures
    assert kept
    assert not any(picture in content for picture in pictures for content in kept)


@pytest.fixture(name="odd")
def _odd(tmp_path: Path) -> Path:
    """Pictures of different modes and sizes. Two images are broken, and one conditioning image."""
    folder = tiny.write_data(tmp_path / "odd", num_samples=10, size=(40, 24))
    train = folder / "train"
    picture = Image.open(train / "0.png")
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(train / "0.png", exif=exif)
    Image.open(train / "1.png").convert("L").save(train / "1.png")
    Image.open(train / "2.png").convert("RGBA").save(train / "2.png")
    Image.open(train / "3.png").convert("CMYK").save(train / "3.png", "tiff")
    Image.new("I;16", (30, 50), 40_000).save(train / "4.png")
    (train / "5.png").write_bytes((train / "5.png").read_bytes()[:300])
    (train / "6.png").unlink()
    (train / "edges-7.png").write_text("a picture", encoding="utf-8")
    return folder


def test_streaming_handles_broken_images_shapes_conditions_and_validation(
    base: Path, odd: Path, tmp_path: Path
) -> None:
    spec = tiny.make_spec(
        base, odd, method="ControlNet", aspectBuckets=True, randomFlip=True, validation={"split": "test"}
    )
    spec = streams.streamed(spec, max_broken=3, max_samples=9, streaming=False)
    reports: list[str] = []
    plain = streams.prepare(spec, tmp_path / "plain", reports, conditioning=True)
    streamed_reports: list[str] = []
    prepared = streams.prepare(streams.streamed(spec), tmp_path / "streamed", streamed_reports, conditioning=True)
    assert len(prepared.batches.source) == 6
    for index in range(6):
        assert prepared.batches.shape(index) == plain.batches.shape(index)
        refs = [SampleRef(1, index)]
        assert_equal(prepared.batches.make(refs), plain.batches.make(refs))
    assert plain.held_out is not None
    assert prepared.held_out is not None
    assert_equal(batch_of(prepared.held_out), batch_of(plain.held_out))
    (warning,) = (text for text in reports if "broken" in text)
    assert warning in streamed_reports
    refused = streams.streamed(spec, max_broken=2)
    second: list[str] = []
    with pytest.raises(DataError, match=r"3 of 9 images are broken: .*5\.png.*dataset\.maxBroken allows 2"):
        streams.prepare(refused, tmp_path / "streamed", second, conditioning=True)
    assert not any("images read" in text for text in second)


def test_only_a_changed_image_is_read_again(base: Path, tmp_path: Path) -> None:
    data = tiny.write_data(tmp_path / "data")
    spec = streams.streamed(tiny.make_spec(base, data, centerCrop=True))
    first = batch_of(streams.prepare(spec, tmp_path / "cache").batches)
    Image.new("RGB", (tiny.RESOLUTION, tiny.RESOLUTION), "red").save(data / "train" / "2.png")
    reports: list[str] = []
    changed = batch_of(streams.prepare(spec, tmp_path / "cache", reports).batches)
    assert [text for text in reports if "images read" in text] == ["1 images read"]
    same = [torch.equal(one, other) for one, other in zip(first.latents, changed.latents, strict=True)]
    assert same == [index % tiny.NUM_SAMPLES != 2 for index in range(len(same))]


@pytest.mark.parametrize("limit", [1, 3, 4, 100])
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_max_samples_limits_the_images_that_are_read(
    kind: str, limit: int, base: Path, data: Path, tmp_path: Path
) -> None:
    source = SOURCES[kind](tmp_path, data)
    spec = streams.streamed(tiny.make_spec(base, data, centerCrop=True), source, max_samples=limit)
    spec = streams.streamed(spec, columns=COLUMNS.get(kind, Columns()))
    reports: list[str] = []
    prepared = streams.prepare(spec, tmp_path / "cache", reports)
    expected = min(limit, tiny.NUM_SAMPLES)
    assert [prepared.batches.source.captions(index) for index in range(len(prepared.batches.source))] == [
        (f"picture {number}",) for number in range(expected)
    ]
    assert [text for text in reports if "images read" in text][-1] == f"{expected} images read"


@given(
    size=st.integers(1, 9),
    counts=st.lists(st.integers(0, 7), max_size=12),
    known=st.booleans(),
    limit=st.none() | st.integers(1, 30),
)
def test_each_row_is_encoded_by_exactly_one_rank(size: int, counts: list[int], known: bool, limit: int | None) -> None:
    known_counts: list[int | None] = [count if known else None for count in counts]
    shares = [RowShare.of(World(rank, size, 0, torch.device("cpu")), known_counts, limit) for rank in range(size)]
    for part, count in enumerate(counts):
        for row in range(count):
            (owner,) = (share for share in shares if share.has(part, row))
            assert owner.reads(part)


def test_streaming_from_a_bucket_gives_the_weights_of_the_copy(
    base: Path, data: Path, tmp_path: Path, object_store: ObjectStore, bucket_url: str
) -> None:
    spec = tiny.make_spec(base, data, steps=2, centerCrop=True)
    plain = Ranks(spec, tmp_path / "plain" / "job", world_size=2)
    assert plain.run() == [ExitCode.DONE] * 2, plain.stderr()
    tables = streams.upload(object_store, bucket_url, streams.write_hub_folder(tmp_path / "tables", data))
    # The row groups have 3, 1 and 3 samples. Rank 0 reads the first, rank 1 the second; they share the third.
    for name, url, shares in (
        ("folder", streams.upload(object_store, bucket_url, data), [3, 4]),
        ("tables", tables, [2, 5]),
    ):
        ranks = Ranks(
            streams.streamed(spec, url),
            tmp_path / name / "job",
            world_size=2,
            # The ranks synchronize after each image, although one of them has more images than the other.
            extra={
                **object_store.environment,
                "TEST_SYNC_OFTEN": "1",
                "HF_HOME": str(tmp_path / name / "cache" / "hub"),
            },
        )
        assert ranks.run() == [ExitCode.DONE] * 2, ranks.stderr()
        assert ranks.weights() == plain.weights()
        assert_nothing_kept(tmp_path / name / "cache", data)
        assert sorted(num_read(ranks, rank) for rank in (0, 1)) == shares


def test_tar_files_are_streamed_from_a_bucket(
    base: Path, data: Path, tmp_path: Path, object_store: ObjectStore, bucket_url: str
) -> None:
    """A folder of .tar files and a single one, compared with the copy of the same samples."""
    rows = streams.rows_of(data)
    streams.write_tar(tmp_path / "whole.tar", rows)
    (tmp_path / "tars").mkdir()
    streams.write_tar(tmp_path / "tars" / "train-00000.tar", rows[:3])
    streams.write_tar(tmp_path / "tars" / "train-00001.tar", rows[3:])
    url = streams.upload(object_store, bucket_url, tmp_path / "tars")
    spec = tiny.make_spec(base, data, centerCrop=True)
    whole = streams.streamed(spec, tmp_path / "whole.tar", columns=COLUMNS["tar"], streaming=False)
    plain = batch_of(streams.prepare(whole, tmp_path / "plain").batches)
    folder = streams.streamed(whole, url)
    assert_equal(batch_of(streams.prepare(folder, tmp_path / "folder").batches), plain)
    single = batch_of(streams.prepare(streams.streamed(whole, f"{url}/train-00000.tar"), tmp_path / "one").batches)
    assert single.captions == tuple(f"picture {number}" for number in (0, 1, 2)) * 2


def num_read(ranks: Ranks, rank: int = 0) -> int:
    """Return the number of images that a rank has read, according to its log."""
    (found,) = re.findall(rf"stream: (\d+) images read by rank {rank}\n", ranks.stderr(rank))
    return int(found)


def test_killed_map_phase_continues_with_missing_images(base: Path, tmp_path: Path) -> None:
    count = SHARD_ITEMS + 14
    data = tiny.write_data(tmp_path / "data", num_samples=count)
    spec = tiny.make_spec(base, data, steps=1, centerCrop=True)
    plain = Ranks(spec, tmp_path / "plain" / "job")
    assert plain.run() == [ExitCode.DONE], plain.stderr()
    # A pipe without a writer: the rank waits for it forever.
    blocked = data / "train" / f"{SHARD_ITEMS}.png"
    content = blocked.read_bytes()
    blocked.unlink()
    os.mkfifo(blocked)
    ranks = Ranks(streams.streamed(spec), tmp_path / "streamed" / "job").start()
    ranks.wait_until(lambda _: any((tmp_path / "streamed" / "cache" / "samples").glob("*/*.safetensors")))
    ranks.send(signal.SIGKILL, 0)
    assert ranks.wait() == [-signal.SIGKILL]
    blocked.unlink()
    blocked.write_bytes(content)
    resumed = Ranks(streams.streamed(spec), tmp_path / "streamed" / "job", attempt=2)
    assert resumed.run() == [ExitCode.DONE], resumed.stderr()
    assert num_read(resumed) == 14
    assert resumed.weights() == plain.weights()


def test_data_sets_that_cannot_be_streamed_are_refused(base: Path, data: Path, tmp_path: Path) -> None:
    def open_source_stream(source: str, split: str = "train", **columns: str) -> None:
        spec = DatasetSpec(source=source, streaming=True, columns=Columns(**columns))
        open_stream(spec, split, None, True, tmp_path / "notes")

    with pytest.raises(ConfigError, match=r"dataset\.streaming: a random crop .* write training\.centerCrop: true"):
        check_spec(streams.streamed(tiny.make_spec(base, data)))
    table = str(SOURCES["parquet"](tmp_path, data))
    with pytest.raises(
        DataError, match=r"dataset\.columns\.caption: .*'words'.* columns are conditioning_image, image, text; "
    ):
        open_source_stream(table, caption="words")
    with pytest.raises(DataError, match=r"dataset\.source: there is no folder or file /nowhere"):
        open_source_stream("/nowhere")
    with pytest.raises(DataError, match=r"dataset\.split: .* no split 'val'; write one that it has: test, train"):
        open_source_stream(str(data), "val")
    with pytest.raises(
        DataError, match=r"dataset\.source: cannot load split 'val' of .*: write a split that it has: train, test"
    ):
        open_source_stream(str(SOURCES["hub"](tmp_path, data)), "val")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 without a footer")
    with pytest.raises(DataError, match=r"dataset\.source: .*bad\.parquet cannot be read"):
        open_source_stream(str(tmp_path / "bad.parquet"))


def test_script_of_the_hub_has_a_message_with_alternatives(tmp_path: Path) -> None:
    script = tmp_path / "circles" / "circles.py"
    script.parent.mkdir()
    script.write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=r"dataset\.source: .* is a script, .* write a data set of parquet files"):
        open_stream(DatasetSpec(source=str(script)), "train", None, True, tmp_path)


def test_memory_does_not_grow_with_the_number_of_images(base: Path, tmp_path: Path) -> None:
    few, many = (write_noise(tmp_path / f"{count}.parquet", count) for count in (40, 400))
    assert many.stat().st_size > few.stat().st_size + 140e6
    small, large = call_in_new_process(peaks_of, base, [few, many], tmp_path / "cache")
    assert large < small + 60e6


def write_noise(path: Path, count: int) -> Path:
    """Write a table of pictures of 400 KB, in row groups of 20."""
    rows = []
    for number in range(count):
        picture = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (400, 340, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(picture, "png", compress_level=0)
        rows.append({"image": {"bytes": picture.getvalue(), "path": None}, "text": "noise"})
    return streams.write_parquet(path, rows, group_rows=20)


def peaks_of(base: Path, tables: list[Path], cache: Path) -> list[int]:
    """Return the peak memory of streaming each of the tables, in bytes."""
    torch.set_num_threads(1)
    peaks = []
    for table in tables:
        reset_peak()
        streams.prepare(streams.streamed(tiny.make_spec(base, table, centerCrop=True)), cache)
        peaks.append(peak_bytes())
    return peaks


def test_streamed_images_that_an_older_decoder_could_not_read_are_read_again(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = streams.streamed(tiny.make_spec(base, data, centerCrop=True), max_broken=1)
    decode, first = decoding.decode, (data / "train" / "0.png").read_bytes()

    def older(file: IO[bytes]) -> Image.Image:
        if file.read() == first:
            raise OSError("unknown format")
        file.seek(0)
        return decode(file)

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "decode", older)
        patch.setattr(decoding, "VERSION", 0)
        assert len(streams.prepare(spec, tmp_path).batches.source) == tiny.NUM_SAMPLES - 1
    reports: list[str] = []
    assert len(streams.prepare(spec, tmp_path, reports).batches.source) == tiny.NUM_SAMPLES
    assert "1 images read" in reports
