"""What is streamed trains as what is copied first, and nothing of the source is kept."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from finetune_contract.exit_codes import ExitCode
from finetune_contract.spec import Columns, DatasetSpec
from finetune_trainer.data.batches import Batch, BatchMaker
from finetune_trainer.data.cache.encode import SHARD_ITEMS
from finetune_trainer.data.cache.stream_map import Share
from finetune_trainer.data.sampling.order import SampleRef
from finetune_trainer.data.sources.open_stream import Opener
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import ConfigError, DataError
from finetune_trainer.train.run import check_spec
from testing.measure.memory import forget_peak, peak_bytes
from testing.measure.process import in_a_process
from testing.objectstore.server import ObjectStore
from testing.trainer import streams, tiny
from testing.trainer.ranks import Ranks
from tests.trainer.data.test_fetched import put

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
def test_batches_are_those_of_the_copy(kind: str, base: Path, data: Path, tmp_path: Path) -> None:
    spec = tiny.make_spec(base, data, centerCrop=True, randomFlip=True)
    source = SOURCES[kind](tmp_path, data)
    spec = streams.streamed(spec, source, columns=COLUMNS.get(kind, Columns()), streaming=False)
    plain = batch_of(streams.prepare(spec, tmp_path / "plain").batches)
    said: list[str] = []
    cache = tmp_path / "streamed"
    assert_equal(batch_of(streams.prepare(streams.streamed(spec), cache, said).batches), plain)
    assert f"{tiny.NUM_SAMPLES} images read" in said
    assert_nothing_kept(cache, data)
    again: list[str] = []
    assert_equal(batch_of(streams.prepare(streams.streamed(spec), cache, again).batches), plain)
    assert not any("images read" in text for text in again)


def assert_nothing_kept(cache: Path, data: Path) -> None:
    pictures = [path.read_bytes() for path in (data / "train").glob("[0-9]*.png")]
    kept = [path.read_bytes() for path in cache.rglob("*") if path.is_file()]
    assert pictures
    assert kept
    assert not any(picture in content for picture in pictures for content in kept)


@pytest.fixture(name="odd")
def _odd(tmp_path: Path) -> Path:
    """Pictures of all sorts and sizes; of two the image is broken, of one the condition."""
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


def test_odd_and_broken_images_shapes_conditions_and_validation(base: Path, odd: Path, tmp_path: Path) -> None:
    spec = tiny.make_spec(
        base, odd, method="ControlNet", aspectBuckets=True, randomFlip=True, validation={"split": "test"}
    )
    spec = streams.streamed(spec, max_broken=3, max_samples=9, streaming=False)
    said: list[str] = []
    plain = streams.prepare(spec, tmp_path / "plain", said, conditioning=True)
    heard: list[str] = []
    prepared = streams.prepare(streams.streamed(spec), tmp_path / "streamed", heard, conditioning=True)
    assert len(prepared.batches.source) == 6
    for index in range(6):
        assert prepared.batches.shape(index) == plain.batches.shape(index)
        refs = [SampleRef(1, index)]
        assert_equal(prepared.batches.make(refs), plain.batches.make(refs))
    assert plain.held_out is not None
    assert prepared.held_out is not None
    assert_equal(batch_of(prepared.held_out), batch_of(plain.held_out))
    (warning,) = (text for text in said if "broken" in text)
    assert warning in heard
    refused = streams.streamed(spec, max_broken=2)
    again: list[str] = []
    with pytest.raises(DataError, match=r"3 of 9 images are broken: .*5\.png.*dataset\.maxBroken allows 2"):
        streams.prepare(refused, tmp_path / "streamed", again, conditioning=True)
    assert not any("images read" in text for text in again)


def test_one_image_that_changed_is_read_anew(base: Path, tmp_path: Path) -> None:
    data = tiny.write_data(tmp_path / "data")
    spec = streams.streamed(tiny.make_spec(base, data, centerCrop=True))
    first = batch_of(streams.prepare(spec, tmp_path / "cache").batches)
    Image.new("RGB", (tiny.RESOLUTION, tiny.RESOLUTION), "red").save(data / "train" / "2.png")
    said: list[str] = []
    second = batch_of(streams.prepare(spec, tmp_path / "cache", said).batches)
    assert [text for text in said if "images read" in text] == ["1 images read"]
    same = [torch.equal(one, other) for one, other in zip(first.latents, second.latents, strict=True)]
    assert same == [index % tiny.NUM_SAMPLES != 2 for index in range(len(same))]


@pytest.mark.parametrize("limit", [1, 3, 4, 100])
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_only_the_first_so_many_are_read(kind: str, limit: int, base: Path, data: Path, tmp_path: Path) -> None:
    source = SOURCES[kind](tmp_path, data)
    spec = streams.streamed(tiny.make_spec(base, data, centerCrop=True), source, max_samples=limit)
    spec = streams.streamed(spec, columns=COLUMNS.get(kind, Columns()))
    said: list[str] = []
    prepared = streams.prepare(spec, tmp_path / "cache", said)
    wanted = min(limit, tiny.NUM_SAMPLES)
    assert [prepared.batches.source.caption(index) for index in range(len(prepared.batches.source))] == [
        f"picture {number}" for number in range(wanted)
    ]
    assert [text for text in said if "images read" in text][-1] == f"{wanted} images read"


@given(
    size=st.integers(1, 9),
    counts=st.lists(st.integers(0, 7), max_size=12),
    known=st.booleans(),
    limit=st.none() | st.integers(1, 30),
)
def test_every_row_is_encoded_by_one_rank(size: int, counts: list[int], known: bool, limit: int | None) -> None:
    told: list[int | None] = [count if known else None for count in counts]
    shares = [Share.of(World(rank, size, 0, torch.device("cpu")), told, limit) for rank in range(size)]
    for part, count in enumerate(counts):
        for row in range(count):
            (owner,) = (share for share in shares if share.has(part, row))
            assert owner.reads(part)


def test_ranks_that_stream_from_a_bucket_end_with_the_weights_of_the_copy(
    base: Path, data: Path, tmp_path: Path, object_store: ObjectStore, bucket_url: str
) -> None:
    spec = tiny.make_spec(base, data, steps=2, centerCrop=True)
    plain = Ranks(spec, tmp_path / "plain" / "job", world_size=2)
    assert plain.run() == [ExitCode.DONE] * 2, plain.stderr()
    tables = put(object_store, bucket_url, streams.write_hub_folder(tmp_path / "tables", data))
    # Of the row groups of 3, 1 and 3 samples the first is the one rank's and the second the other's.
    for name, url, shares in (("folder", put(object_store, bucket_url, data), [3, 4]), ("tables", tables, [2, 5])):
        ranks = Ranks(
            streams.streamed(spec, url),
            tmp_path / name / "job",
            world_size=2,
            # They meet after each image, of which one has more than the other.
            extra={
                **object_store.environment,
                "TEST_MEET_OFTEN": "1",
                "HF_HOME": str(tmp_path / name / "cache" / "hub"),
            },
        )
        assert ranks.run() == [ExitCode.DONE] * 2, ranks.stderr()
        assert ranks.weights() == plain.weights()
        assert_nothing_kept(tmp_path / name / "cache", data)
        assert sorted(num_read(ranks, rank) for rank in (0, 1)) == shares


def num_read(ranks: Ranks, rank: int = 0) -> int:
    """Images that a rank says that it has read."""
    (found,) = re.findall(rf"stream: (\d+) images read by rank {rank}\n", ranks.stderr(rank))
    return int(found)


def test_a_killed_map_goes_on_with_what_is_missing(base: Path, tmp_path: Path) -> None:
    count = SHARD_ITEMS + 14
    data = tiny.write_data(tmp_path / "data", num_samples=count)
    spec = tiny.make_spec(base, data, steps=1, centerCrop=True)
    plain = Ranks(spec, tmp_path / "plain" / "job")
    assert plain.run() == [ExitCode.DONE], plain.stderr()
    # A pipe that nobody writes to: the rank waits there for ever.
    stuck = data / "train" / f"{SHARD_ITEMS}.png"
    content = stuck.read_bytes()
    stuck.unlink()
    os.mkfifo(stuck)
    ranks = Ranks(streams.streamed(spec), tmp_path / "streamed" / "job").start()
    ranks.wait_until(lambda _: any((tmp_path / "streamed" / "cache" / "samples").glob("*/*.safetensors")))
    ranks.send(signal.SIGKILL, 0)
    assert ranks.wait() == [-signal.SIGKILL]
    stuck.unlink()
    stuck.write_bytes(content)
    again = Ranks(streams.streamed(spec), tmp_path / "streamed" / "job", attempt=2)
    assert again.run() == [ExitCode.DONE], again.stderr()
    assert num_read(again) == 14
    assert again.weights() == plain.weights()


def test_what_cannot_be_streamed_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    def opening(source: str, split: str = "train", **columns: str) -> None:
        spec = DatasetSpec(source=source, streaming=True, columns=Columns(**columns))
        Opener(spec, split, None, True, tmp_path / "notes").open()

    with pytest.raises(ConfigError, match=r"dataset\.streaming: a random crop .* write training\.centerCrop: true"):
        check_spec(streams.streamed(tiny.make_spec(base, data)))
    table = str(SOURCES["parquet"](tmp_path, data))
    with pytest.raises(
        DataError, match=r"dataset\.columns\.caption: .*'words'.* columns are conditioning_image, image"
    ):
        opening(table, caption="words")
    with pytest.raises(DataError, match=r"dataset\.source: there is no folder or file /nowhere"):
        opening("/nowhere")
    with pytest.raises(DataError, match=r"dataset\.split: .* no split 'val'; it has test, train"):
        opening(str(data), "val")
    with pytest.raises(DataError, match=r"dataset\.source: cannot load split 'val' of .*: it has train, test"):
        opening(str(SOURCES["hub"](tmp_path, data)), "val")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"dataset\.source: .*bad\.parquet cannot be read"):
        opening(str(tmp_path / "bad.parquet"))


def test_a_script_on_the_hub_has_its_own_sentence(tmp_path: Path) -> None:
    script = tmp_path / "circles" / "circles.py"
    script.parent.mkdir()
    script.write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=r"dataset\.source: .* is a script, .* write a data set of parquet files"):
        Opener(DatasetSpec(source=str(script)), "train", None, True, tmp_path).open()


def test_memory_does_not_grow_with_the_images(base: Path, tmp_path: Path) -> None:
    few, many = (write_noise(tmp_path / f"{count}.parquet", count) for count in (40, 400))
    assert many.stat().st_size > few.stat().st_size + 140e6
    small, large = in_a_process(peaks_of, base, [few, many], tmp_path / "cache")
    assert large < small + 60e6


def write_noise(path: Path, count: int) -> Path:
    """Pictures of 400 KB each, in row groups of 20."""
    rows = []
    for number in range(count):
        picture = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (400, 340, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(picture, "png", compress_level=0)
        rows.append({"image": {"bytes": picture.getvalue(), "path": None}, "text": "noise"})
    return streams.write_parquet(path, rows, group_rows=20)


def peaks_of(base: Path, tables: list[Path], cache: Path) -> list[int]:
    """The most memory that streaming each of the tables takes, in bytes."""
    torch.set_num_threads(1)
    peaks = []
    for table in tables:
        forget_peak()
        streams.prepare(streams.streamed(tiny.make_spec(base, table, centerCrop=True)), cache)
        peaks.append(peak_bytes())
    return peaks
