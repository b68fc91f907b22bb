"""Tests of the check of local data sets before a run, and of the paths of a manifest."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from finetune_contract.input_spec import Columns, DatasetSpec
from finetune_operator.api.validate import parse_job
from finetune_operator.cli.manifest import make_absolute
from finetune_operator.cli.preflight.dataset import find_dataset_problems
from tests.api.manifests import GOOD, patched

CSV = "file_name,text\na.png,a dog\n"


def problems_of(folder: Path, files: Mapping[str, str], source: str = "", needs_captions: bool = True) -> list[str]:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    dataset = DatasetSpec(source=str(folder / source))
    return list(find_dataset_problems(dataset, "dataset.split", "train", needs_captions))


@pytest.mark.parametrize(
    "files",
    [
        {"a.png": "", "a.txt": "a dog", "b.HEIC": "", "b.caption": "a cat", "._a.png": ""},
        {"10_sks dog/a.png": ""},
        {"train/a.png": "", "train/a.txt": "a dog", "test/b.png": ""},
        {"a.png": "", "metadata.csv": CSV},
        {"a.png": "", "metadata.csv": "\ufefffile_name;text\na.png;a dog\n"},
        {"a.png": "", "metadata.parquet": ""},
        {"a.png": "", "metadata.jsonl": '{"file_name": "a.png", "text": ["a dog", "a pet"]}\n'},
        {"data/train.parquet": ""},
    ],
)
def test_data_sets_that_the_trainer_reads_have_no_problem(tmp_path: Path, files: dict[str, str]) -> None:
    assert problems_of(tmp_path, files) == []


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (
            {"a.png": "", "b.png": "", "b.txt": "x"},
            "source: 1 of 2 images .* no caption, e.g. a.png; write a .txt",
        ),
        ({"a.png": "", "2024_trip/b.png": ""}, "source: .* contains neither metadata.jsonl nor .*, or a .txt file"),
        ({"notes.txt": "x"}, "source: .* contains neither metadata.jsonl nor train/metadata.jsonl, nor images"),
        ({"test/a.png": "", "test/a.txt": "x"}, "split: .* has no split 'train'; write one of test"),
        ({"a.png": "", "metadata.csv": CSV + "b.png,a, b\n"}, "source: .*metadata.csv: line 3 has 3 cells"),
        (
            {"a.png": "", "metadata.csv": "file_name,caption\na.png,x\n"},
            "columns.caption: line 2 .* no column 'text'",
        ),
        ({"metadata.csv": CSV}, "source: line 2 of .* names the image .*a.png, which does not exist"),
        (
            {"a.png": "", "metadata.jsonl": '{"file_name": "a.png", "text": ["x", 7]}'},
            "columns.caption: .* not text",
        ),
    ],
)
def test_problems_are_found_before_the_run(tmp_path: Path, files: dict[str, str], problem: str) -> None:
    (found,) = problems_of(tmp_path, files)
    assert re.match(rf"spec\.dataset\.{problem}", found), found


def test_captions_are_optional_for_methods_that_need_none(tmp_path: Path) -> None:
    rows = '{"file_name": "a.png"}\n{"file_name": "a.png", "text": null}\n'
    assert problems_of(tmp_path / "listed", {"a.png": "", "metadata.jsonl": rows}, needs_captions=False) == []
    assert problems_of(tmp_path / "bare", {"a.png": ""}, needs_captions=False) == []
    assert problems_of(tmp_path / "csv", {"a.png": "", "list.csv": CSV}, "list.csv") == []


def test_folder_without_metadata_has_no_conditioning_images(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "a.txt").write_text("a dog", encoding="utf-8")
    dataset = DatasetSpec(source=str(tmp_path), columns=Columns(conditioning="edges"))
    (found,) = find_dataset_problems(dataset, "dataset.split", "train", True)
    assert found.endswith("write one that names the conditioning images")


def test_all_paths_of_a_manifest_become_absolute(tmp_path: Path) -> None:
    changes = {
        "spec.dataset": {"source": "data", "additional": [{"source": "more/photos"}, {"source": "s3://b/c"}]},
        "spec.training.dreambooth.classPrompt": "a dog",
        "spec.training.dreambooth.classImages": "./dogs",
    }
    (tmp_path / "more").mkdir()
    spec = make_absolute(parse_job(patched(GOOD["dreambooth"], changes)), tmp_path).spec
    assert [each.source for each in spec.dataset.additional] == [f"{tmp_path}/more/photos", "s3://b/c"]
    assert spec.training.dreambooth is not None
    assert spec.training.dreambooth.class_images == f"{tmp_path}/dogs"
    validation = {"spec.training.validation": {"prompts": ["a", "b"], "images": ["edges.png", "s3://b/c.png"]}}
    spec = make_absolute(parse_job(patched(GOOD["controlnet"], validation)), tmp_path).spec
    assert spec.training.validation is not None
    assert spec.training.validation.images == (f"{tmp_path}/edges.png", "s3://b/c.png")
