"""Tests of data sets in all layouts, and of the messages for those that cannot be used."""

from __future__ import annotations

import importlib
import json
import pkgutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

import datasets
import pytest
from PIL import Image

from finetune_contract.input_spec import Columns, DatasetSpec
from finetune_trainer.data import sources
from finetune_trainer.data.images.decoding import decode_sample
from finetune_trainer.data.sources.folder import FolderStream, SampleRows
from finetune_trainer.data.sources.open import FILE_SUFFIXES, LAYOUTS, open_source
from finetune_trainer.data.sources.sample_lists import SampleRow
from finetune_trainer.data.sources.table_cells import TableColumns, TableStream
from finetune_trainer.errors import DataError
from testing.trainer import tiny


def write_metadata(folder: Path, *rows: object) -> DatasetSpec:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    return DatasetSpec(source=str(folder))


def test_folder_with_splits_opens_the_requested_one(data: Path) -> None:
    source = open_source(DatasetSpec(source=str(data)), "test")
    assert len(source) == tiny.NUM_SAMPLES
    assert source.captions(2) == ("picture 2",)
    assert decode_sample(source, 2).size == (tiny.RESOLUTION, tiny.RESOLUTION)


def test_max_samples_limits_the_samples(data: Path) -> None:
    assert len(open_source(DatasetSpec(source=str(data)), "train", 3)) == 3


def test_folder_without_splits_opens_for_any_split(tmp_path: Path) -> None:
    spec = write_metadata(tmp_path, {"file_name": "a.png", "text": "one"})
    assert open_source(spec, "train").captions(0) == ("one",)


def test_manifest_can_name_other_columns(tmp_path: Path) -> None:
    spec = write_metadata(tmp_path, {"picture": "a.png", "words": "one"})
    spec = spec.model_copy(update={"columns": Columns(image="picture", caption="words")})
    source = open_source(spec, "train")
    assert source.captions(0) == ("one",)
    assert decode_sample(source, 0).size == (4, 4)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"file_name": "a.png", "caption": "x"}], r"dataset\.columns\.caption: .* columns are caption, file_name; "),
        ([{"path": "a.png", "text": "x"}], r"dataset\.columns\.image: .* columns are path, text"),
        ([{"file_name": "a.png", "text": None}], r"dataset\.columns\.caption: .*:1 has None, which is not a text"),
        (["words"], r"metadata\.jsonl:1 is not a JSON object"),
        ([], r"dataset\.source: .* has no samples; write"),
    ],
)
def test_invalid_metadata_is_refused(tmp_path: Path, rows: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(write_metadata(tmp_path, *rows), "train")


def test_invalid_json_names_the_line(tmp_path: Path) -> None:
    spec = write_metadata(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n{"file', encoding="utf-8")
    with pytest.raises(DataError, match=r"metadata\.jsonl:2 is not valid JSON"):
        open_source(spec, "train")


def test_missing_split_names_the_existing_ones(data: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.split: .* no split 'val'; write one that it has: test, train"):
        open_source(DatasetSpec(source=str(data)), "val")


def test_missing_folder_is_refused() -> None:
    with pytest.raises(DataError, match=r"dataset\.source: there is no folder or file /nowhere"):
        open_source(DatasetSpec(source="/nowhere"), "train")


def test_folder_without_metadata_and_captions_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"has neither metadata\.jsonl nor train/metadata\.jsonl; write one"):
        open_source(DatasetSpec(source=str(tmp_path)), "train")


def test_missing_and_broken_images_are_named(tmp_path: Path) -> None:
    spec = write_metadata(tmp_path, {"file_name": "gone.png", "text": "x"}, {"file_name": "bad.png", "text": "x"})
    (tmp_path / "bad.png").write_bytes(b"no image")
    source = open_source(spec, "train")
    with pytest.raises(DataError, match=r"gone\.png cannot be read"):
        decode_sample(source, 0)
    with pytest.raises(DataError, match=r"bad\.png is not a complete image"):
        decode_sample(source, 1)


def test_datasets_library_loads_a_table(tmp_path: Path) -> None:
    """A parquet file in a folder with a card, which the library opens in the same way as a data set of the hub."""
    images = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    table = datasets.Dataset.from_dict(
        {"image": images, "text": ["one", "two"]},
        features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}),
    )
    table.to_parquet(tmp_path / "repo" / "data" / "train.parquet")
    (tmp_path / "repo" / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: data/train.parquet\n---\n", encoding="utf-8"
    )
    spec = DatasetSpec(source=str(tmp_path / "repo"))
    source = open_source(spec, "train")
    assert [source.captions(index) for index in range(len(source))] == [("one",), ("two",)]
    assert decode_sample(source, 1).getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(DataError, match=r"dataset\.columns\.caption: .*'words'.* columns are image, text"):
        open_source(spec.model_copy(update={"columns": Columns(caption="words")}), "train")
    with pytest.raises(DataError, match=r"dataset\.source: cannot load split 'test'"):
        open_source(spec, "test")


def test_each_layout_is_in_the_table() -> None:
    names = sorted(module.name for module in pkgutil.iter_modules(sources.__path__))
    modules = [importlib.import_module(f"{sources.__name__}.{name}") for name in names]
    layouts = {module.__name__: module.LAYOUT for module in modules if hasattr(module, "LAYOUT")}
    assert len(layouts) == len(LAYOUTS)
    for name, layout in layouts.items():
        assert layout in LAYOUTS, f"add {name}.LAYOUT to LAYOUTS in sources/open.py"


def test_no_file_suffix_belongs_to_two_layouts() -> None:
    assert len(FILE_SUFFIXES) == len(set(FILE_SUFFIXES)) > 0


class _FixedFolder:
    """A folder whose location and stamps do not depend on this machine."""

    url = "s3://bucket/data"

    def list_files(self) -> list[str]:
        return []

    def list_subfolders_with(self, name: str) -> list[str]:
        return []

    def stamp(self, name: str) -> str | None:
        return f"stamp of {name}"

    def read(self, name: str) -> bytes:
        raise AssertionError(name)

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        raise AssertionError(name)


def test_cache_keys_of_streams_are_stable_across_releases() -> None:
    """A change of these keys makes every job read its data set again."""
    rows = [SampleRow("0.png", ("one",)), SampleRow("1.png", ("two",), "edges-1.png")]
    stream = FolderStream(SampleRows(_FixedFolder(), "train", rows))
    columns = TableColumns(Columns(), needs_captions=True, source="unused")
    table = TableStream(columns.hash_files("parquet", [("s3://bucket/data.parquet", "stamp")]))
    keys = [stream.identity, stream.key(0, 0), stream.key(0, 1), table.identity, table.key(1, 2)]
    assert [key[:16] for key in keys] == [
        "caa639ff4ba3e4d7",
        "229c8d433511bc85",
        "992dbf9a850cb72d",
        "7517a9691fb7bf38",
        "39f3bf409a74a702",
    ]
