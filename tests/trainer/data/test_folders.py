"""Tests of folders of images as people have them: caption files, other files, subfolders, repeats, lists of samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from finetune_contract.image_folder import IMAGE_SUFFIXES, is_hidden, repeats_of, split_captions
from finetune_contract.input_spec import Columns, DatasetSpec
from finetune_trainer.data.images.decoding import decode_sample
from finetune_trainer.data.sources.base import SampleSource
from finetune_trainer.data.sources.layout import JobContext
from finetune_trainer.data.sources.open import open_source, open_stream
from finetune_trainer.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def write(folder: Path, files: Mapping[str, str | bytes | None]) -> DatasetSpec:
    """Write files; None stands for an image of the format that the suffix names."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Image.fromarray(PIXELS).save(path, None if path.suffix.lower() != ".jfif" else "jpeg")
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return DatasetSpec(source=str(folder))


def captions_of(source: SampleSource) -> dict[str, tuple[str, ...]]:
    return {Path(source.name(index)).name: source.captions(index) for index in range(len(source))}


def open_with_warnings(spec: DatasetSpec, needs_captions: bool = False) -> tuple[SampleSource, list[str]]:
    warnings: list[str] = []
    return open_source(spec, "train", None, needs_captions, JobContext(("train", "held"), warnings.append)), warnings


def test_captions_are_read_from_files_next_to_the_images(tmp_path: Path) -> None:
    spec = write(
        tmp_path,
        {
            **dict.fromkeys(("a.png", "b.png", "c.PNG", "d.png", "e.png"), None),
            "a.txt": "a dog\r\n",
            "b.caption": "a cat",
            "b.txt": "a hat\n\n a bat \n",
            "c.txt": "\ufeffa hut",
            "d.caption": "ein Haus in Köln".encode("utf-16"),
            "e.txt": "",
        },
    )
    assert captions_of(open_source(spec, "train")) == {
        "a.png": ("a dog",),
        "b.png": ("a hat", "a bat"),
        "c.PNG": ("a hut",),
        "d.png": ("ein Haus in Köln",),
        "e.png": ("",),
    }


def test_images_without_caption_are_named(tmp_path: Path) -> None:
    spec = write(tmp_path, {"a.png": None, "a.txt": "a dog", "b.png": None})
    with pytest.raises(DataError, match=r"dataset\.source: 1 of 2 images of .* have no caption: b\.png; write a \.txt"):
        open_source(spec, "train")
    assert captions_of(open_source(spec, "train", needs_captions=False)) == {"a.png": ("a dog",), "b.png": ()}


@pytest.mark.parametrize("content", ["Köln".encode("latin-1"), "a dog".encode("utf-16-le")])
def test_other_encodings_of_captions_are_refused(tmp_path: Path, content: bytes) -> None:
    spec = write(tmp_path, {"a.png": None, "a.txt": content})
    with pytest.raises(DataError, match=r"a\.txt is not valid UTF-8: .*; save it in this encoding"):
        open_source(spec, "train")


def test_all_formats_and_subfolders_are_read_and_other_files_are_named(tmp_path: Path) -> None:
    """Twelve photos, as phones, browsers and scanners write them, between files of operating systems."""
    images = [
        *("1.png", "2.JPG", "3.jpeg", "4.jfif", "5.webp", "6.gif", "7.bmp", "8.tiff", "9.heic", "10.avif"),
        *("trip/11.png", "trip/day 1/12.jpg"),
    ]
    others = {
        **dict.fromkeys(("._1.png", ".DS_Store", "Thumbs.db", "desktop.ini", ".cache/x.png", "__MACOSX/1.png"), "x"),
        "notes.md": "x",
        "clip.mp4": "x",
        "raw.cr2": "x",
        "trip/old.psd": "x",
    }
    source, warnings = open_with_warnings(write(tmp_path, {**dict.fromkeys(images), **others}))
    assert {Path(source.name(index)).relative_to(tmp_path).as_posix() for index in range(len(source))} == set(images)
    assert all(decode_sample(source, index).size == (8, 8) for index in range(len(source)))
    (warning,) = warnings
    assert "3 files of" in warning
    assert warning.endswith("not images of a known format: clip.mp4, raw.cr2, trip/old.psd")


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    write(tmp_path / "photos", {"a.png": None})
    spec = write(tmp_path / "set", {"b.png": None})
    (tmp_path / "set" / "more").symlink_to(tmp_path / "photos")
    (tmp_path / "set" / "self").symlink_to(tmp_path / "set")
    source, _ = open_with_warnings(spec)
    assert list(captions_of(source)) == ["b.png", "a.png"]


def test_folders_of_other_splits_are_left_out(tmp_path: Path) -> None:
    spec = write(tmp_path, dict.fromkeys(("a.png", "test/b.png", "held/c.png", "more/d.png")))
    source, _ = open_with_warnings(spec)
    assert list(captions_of(source)) == ["a.png", "d.png"]
    assert list(captions_of(open_source(spec, "held", needs_captions=False))) == ["c.png"]


def test_missing_split_of_a_folder_of_images_names_the_others(tmp_path: Path) -> None:
    spec = write(tmp_path, dict.fromkeys(("test/b.png", "validation/c.png")))
    with pytest.raises(
        DataError, match=r"dataset\.split: .* no split 'train'; write one that it has: test, validation"
    ):
        open_source(spec, "train", needs_captions=False)


def test_folders_with_repeats(tmp_path: Path) -> None:
    spec = write(
        tmp_path,
        {
            **dict.fromkeys(("10_sks dog/a.png", "10_sks dog/b.png", "2024_trip/c.png", "01_x/d.png", "e.png")),
            **dict.fromkeys(("10_sks dog/b.txt", "2024_trip/c.txt", "01_x/d.txt", "e.txt"), "own"),
        },
    )
    source, warnings = open_with_warnings(spec, needs_captions=True)
    by_name = captions_of(source)
    assert by_name["a.png"] == ("sks dog",)
    assert by_name["b.png"] == ("own",)
    repeats = {Path(source.name(index)).name: source.repeats(index) for index in range(len(source))}
    assert repeats == {"a.png": 10, "b.png": 10, "c.png": 1, "d.png": 1, "e.png": 1}
    (warning,) = warnings
    assert "10 times for 10_sks dog; rename a folder" in warning


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("3_a/x.png", (3, "a")),
        ("3_a/b/x.png", (3, "a")),
        ("3_a/20_b c/x.png", (20, "b c")),
        ("999_a/x.png", (999, "a")),
        ("1000_a/x.png", None),
        ("0_a/x.png", None),
        ("_a/x.png", None),
        ("3_/x.png", None),
        ("3_a.png", None),
    ],
)
def test_names_with_repeats(name: str, expected: tuple[int, str] | None) -> None:
    assert repeats_of(name) == expected


def test_hidden_names() -> None:
    assert all(map(is_hidden, ("._a.png", "a/.b/c.png", "THUMBS.DB", "@eaDir/a.png")))
    assert not any(map(is_hidden, ("a.png", "a.b/c.png", "thumbs/a.png")))
    assert ".heic" in IMAGE_SUFFIXES
    assert split_captions(" a \n\n\tb\r\n") == ("a", "b")


@pytest.mark.parametrize(
    "text",
    [
        'file_name,text\na.png,"a dog, with a ""red"" hat"\nb.png,"two\nlines"\n',
        '\ufefffile_name;text\r\na.png;a dog, with a "red" hat\r\nb.png;"two\nlines"\r\n'.replace('"red"', '"red"'),
        'file_name\ttext\na.png\t"a dog, with a ""red"" hat"\n\nb.png\t"two\nlines"',
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_metadata_csv(tmp_path: Path, text: str, encoding: str) -> None:
    spec = write(tmp_path, {"a.png": None, "b.png": None, "metadata.csv": text.encode(encoding)})
    assert captions_of(open_source(spec, "train")) == {
        "a.png": ('a dog, with a "red" hat',),
        "b.png": ("two\nlines",),
    }
    alone = spec.model_copy(update={"source": f"{tmp_path}/metadata.csv"})
    assert len(open_source(alone, "train", 1)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,text\na.png,a dog, a cat\n", r"line 2 has 3 cells, and the first line has 2; write a caption"),
        ('file_name,text\na.png,"a dog\n', r"line 2 is not valid CSV"),
        ("file_name,caption\na.png,a dog\n", r"dataset\.columns\.caption: .*:2 has no column 'text'; the columns are"),
        ("file_name,text\n,a dog\n", r"dataset\.columns\.image: .* is '', which is not the name of a file"),
    ],
)
def test_invalid_csv_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(write(tmp_path, {"a.png": None, "metadata.csv": text}), "train")


def test_metadata_parquet(tmp_path: Path) -> None:
    spec = write(tmp_path, {"train/a.png": None, "train/b.png": None})
    table = pa.table({"file_name": ["a.png", "b.png"], "text": [["a dog", "a pet"], ["a cat"]]})
    parquet.write_table(table, tmp_path / "train" / "metadata.parquet")
    assert captions_of(open_source(spec, "train")) == {"a.png": ("a dog", "a pet"), "b.png": ("a cat",)}


def test_metadata_jsonl_with_marks_lists_and_missing_captions(tmp_path: Path) -> None:
    lines = '\ufeff{"file_name": "a.png", "text": ["a dog", null, "a pet"]}\r\n{"file_name": "b.png"}\r\n'
    spec = write(tmp_path, {"a.png": None, "b.png": None, "metadata.jsonl": lines})
    read = open_source(spec, "train", needs_captions=False)
    assert captions_of(read) == {"a.png": ("a dog", "a pet"), "b.png": ()}
    with pytest.raises(DataError, match=r"dataset\.columns\.caption: .*:2 has no column 'text'"):
        open_source(spec, "train")


def encoded() -> bytes:
    import io  # noqa: PLC0415  only here

    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize(
    "captions",
    [
        pa.array(["a dog", "a cat"], pa.large_string()),
        pa.array(["a dog", "a cat"]).dictionary_encode(),
        pa.array([b"a dog", b"a cat"], pa.binary()),
        pa.array([["a dog"], ["a cat"]], pa.large_list(pa.string())),
    ],
    ids=["large", "dictionary", "bytes", "lists"],
)
@pytest.mark.parametrize("images", [pa.binary(), pa.large_binary()], ids=["binary", "large binary"])
def test_column_types_of_tables(tmp_path: Path, captions: pa.Array, images: pa.DataType) -> None:
    table = pa.table({"image": pa.array([encoded()] * 2, images), "text": captions})
    parquet.write_table(table, tmp_path / "data.parquet")
    spec = DatasetSpec(source=f"{tmp_path}/data.parquet")
    source = open_source(spec, "train")
    assert [source.captions(index) for index in range(2)] == [("a dog",), ("a cat",)]
    assert np.array_equal(np.asarray(decode_sample(source, 1)), PIXELS)
    stream = open_stream(spec, "train", None, True, tmp_path / "notes")
    rows = [row for part in range(stream.num_parts()) for row in stream.read(part, 0)]
    assert [row.captions for row in rows] == [("a dog",), ("a cat",)]
    assert rows[0].image() == encoded()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"image": [[encoded()]], "text": ["a dog"]},
            r"dataset\.columns\.image: the column 'image' of .* lists of images",
        ),
        ({"image": [7], "text": ["a dog"]}, r"dataset\.columns\.image: "),
        ({"image": [encoded()], "text": [7]}, r"dataset\.columns\.caption: row 0.* has 7, which is not a text"),
        ({"image": [encoded()], "text": [None]}, r"dataset\.columns\.caption: row 0.* has None, which is not a text"),
    ],
    ids=["lists of images", "numbers as images", "numbers as captions", "no caption"],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_cannot_be_used_are_refused(
    tmp_path: Path, columns: dict[str, list[object]], message: str, streaming: bool
) -> None:
    """A permanent error: the job does not try again."""
    parquet.write_table(pa.table(columns), tmp_path / "data.parquet")
    spec = DatasetSpec(source=f"{tmp_path}/data.parquet")
    with pytest.raises(DataError, match=message):
        if streaming:
            stream = open_stream(spec, "train", None, True, tmp_path / "notes")
            [row.image() for row in stream.read(0, 0)]
        else:
            source = open_source(spec, "train")
            source.captions(0), decode_sample(source, 0)


def test_rows_without_caption_are_read_if_the_method_needs_none(tmp_path: Path) -> None:
    table = pa.table({"image": [encoded()], "text": pa.array([None], pa.string())})
    parquet.write_table(table, tmp_path / "data.parquet")
    assert open_source(DatasetSpec(source=f"{tmp_path}/data.parquet"), "train", None, False).captions(0) == ()


def test_key_of_a_stream_covers_all_captions(tmp_path: Path) -> None:
    spec = write(tmp_path, {"a.png": None, "a.txt": "a dog\na pet"})
    before = open_stream(spec, "train", None, True, tmp_path / "notes")
    (tmp_path / "a.txt").write_text("a dog\na cat", encoding="utf-8")
    after = open_stream(spec, "train", None, True, tmp_path / "notes")
    assert (before.key(0, 0) == after.key(0, 0), before.identity == after.identity) == (False, True)


def test_tables_named_like_metadata_stay_tables(tmp_path: Path) -> None:
    table = pa.table({"picture": pa.array([encoded()], pa.binary()), "text": ["a dog"]})
    parquet.write_table(table, tmp_path / "metadata.parquet")
    (tmp_path / "._metadata.parquet").write_bytes(b"x")
    spec = DatasetSpec(source=str(tmp_path), columns=Columns(image="picture"))
    assert open_source(spec, "train").captions(0) == ("a dog",)
