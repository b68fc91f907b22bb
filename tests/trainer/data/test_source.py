"""Data sets, and what is said about those that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from PIL import Image

from finetune_contract.spec import Columns, DatasetSpec
from finetune_trainer.data.sources.base import decode_sample
from finetune_trainer.data.sources.open_source import open_source
from finetune_trainer.data.sources.table import open_table
from finetune_trainer.errors import DataError
from testing.trainer import tiny


def write_metadata(folder: Path, *rows: object) -> DatasetSpec:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    return DatasetSpec(source=str(folder))


def test_folder_with_splits(data: Path) -> None:
    source = open_source(DatasetSpec(source=str(data)), "test")
    assert len(source) == tiny.NUM_SAMPLES
    assert source.caption(2) == "picture 2"
    assert decode_sample(source, 2).size == (tiny.RESOLUTION, tiny.RESOLUTION)


def test_max_samples(data: Path) -> None:
    assert len(open_source(DatasetSpec(source=str(data)), "train", 3)) == 3


def test_folder_without_splits_serves_any(tmp_path: Path) -> None:
    spec = write_metadata(tmp_path, {"file_name": "a.png", "text": "one"})
    assert open_source(spec, "train").caption(0) == "one"


def test_other_columns(tmp_path: Path) -> None:
    spec = write_metadata(tmp_path, {"picture": "a.png", "words": "one"})
    spec = spec.model_copy(update={"columns": Columns(image="picture", caption="words")})
    source = open_source(spec, "train")
    assert source.caption(0) == "one"
    assert decode_sample(source, 0).size == (4, 4)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"file_name": "a.png", "caption": "x"}], r"dataset\.columns\.caption: .* columns are caption, file_name"),
        ([{"path": "a.png", "text": "x"}], r"dataset\.columns\.image: .* columns are path, text"),
        ([{"file_name": "a.png", "text": None}], r"dataset\.columns\.caption: .*:1 holds None, not a text"),
        (["words"], r"metadata\.jsonl:1 is not a JSON object"),
        ([], r"dataset\.source: .* holds no samples"),
    ],
)
def test_bad_metadata(tmp_path: Path, rows: list[object], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        open_source(write_metadata(tmp_path, *rows), "train")


def test_broken_json(tmp_path: Path) -> None:
    spec = write_metadata(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n{"file', encoding="utf-8")
    with pytest.raises(DataError, match=r"metadata\.jsonl:2 is not JSON"):
        open_source(spec, "train")


def test_missing_split_names_those_that_exist(data: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.split: .* no split 'val'; it has test, train"):
        open_source(DatasetSpec(source=str(data)), "val")


def test_missing_folder() -> None:
    with pytest.raises(DataError, match=r"dataset\.source: there is no folder or file /nowhere"):
        open_source(DatasetSpec(source="/nowhere"), "train")


def test_folder_without_metadata(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds neither metadata\.jsonl nor train/metadata\.jsonl"):
        open_source(DatasetSpec(source=str(tmp_path)), "train")


def test_missing_and_broken_images_are_named(tmp_path: Path) -> None:
    spec = write_metadata(tmp_path, {"file_name": "gone.png", "text": "x"}, {"file_name": "bad.png", "text": "x"})
    (tmp_path / "bad.png").write_bytes(b"no image")
    source = open_source(spec, "train")
    with pytest.raises(DataError, match=r"gone\.png cannot be read"):
        decode_sample(source, 0)
    with pytest.raises(DataError, match=r"bad\.png is not a whole image"):
        decode_sample(source, 1)


def test_table_of_the_datasets_library(tmp_path: Path) -> None:
    """A parquet file, which the library loads as it does a data set of the hub."""
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
    source = open_table(spec, "train", None, True)
    assert [source.caption(index) for index in range(len(source))] == ["one", "two"]
    assert decode_sample(source, 1).getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(DataError, match=r"dataset\.columns\.caption: .*'words'.* columns are image, text"):
        open_table(spec.model_copy(update={"columns": Columns(caption="words")}), "train", None, True)
    with pytest.raises(DataError, match=r"dataset\.source: cannot load split 'test'"):
        open_table(spec, "test", None, True)
