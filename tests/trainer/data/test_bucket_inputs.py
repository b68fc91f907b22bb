"""Tests of bases and data sets in an object store, with a real S3 server."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from finetune_contract.bucket import Bucket
from finetune_contract.exit_codes import ExitCode
from finetune_contract.input_spec import DatasetSpec
from finetune_trainer.data.images.decoding import decode_sample
from finetune_trainer.data.sources.open import open_source
from finetune_trainer.errors import ConfigError
from finetune_trainer.fetched import fetch
from testing.objectstore.server import ObjectStore
from testing.trainer import streams, tiny
from testing.trainer.ranks import Ranks

pytestmark = pytest.mark.trainer


def test_run_from_a_bucket_equals_the_run_from_folders(
    base: Path, data: Path, tmp_path: Path, object_store: ObjectStore, bucket_url: str
) -> None:
    spec = tiny.make_spec(base, data, steps=1)
    plain = Ranks(spec, tmp_path / "plain" / "job", world_size=2)
    assert plain.run() == [ExitCode.DONE] * 2, plain.stderr()
    remote = spec.model_copy(
        update={
            "model": spec.model.model_copy(update={"base": streams.upload(object_store, bucket_url, base)}),
            "dataset": spec.dataset.model_copy(update={"source": streams.upload(object_store, bucket_url, data)}),
        }
    )
    ranks = Ranks(remote, tmp_path / "remote" / "job", world_size=2, extra=dict(object_store.environment))
    assert ranks.run() == [ExitCode.DONE] * 2, ranks.stderr()
    assert ranks.weights() == plain.weights()
    latents = [
        sorted(path.name for path in (tmp_path / run / "cache" / "latents").iterdir()) for run in ("plain", "remote")
    ]
    assert latents[0] == latents[1] != []


def test_complete_files_are_not_fetched_again(
    tmp_path: Path, object_store: ObjectStore, bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    (source / "a.txt").write_text("one", encoding="utf-8")
    (source / "b.txt").write_text("two", encoding="utf-8")
    url = streams.upload(object_store, bucket_url, source)
    reports: list[str] = []
    folder = Path(fetch(url, "dataset.source", tmp_path / "cache", reports.append))
    assert reports[-1] == "2/2 objects fetched"
    assert (folder / "a.txt").read_text(encoding="utf-8") == "one"
    before = (folder / "a.txt").stat().st_mtime_ns
    (folder / "b.txt").write_text("cut", encoding="utf-8")
    os.truncate(folder / "b.txt", 1)
    assert Path(fetch(url, "dataset.source", tmp_path / "cache", reports.append)) == folder
    assert (folder / "a.txt").stat().st_mtime_ns == before
    assert (folder / "b.txt").read_text(encoding="utf-8") == "two"


def test_changed_and_removed_objects_are_found(tmp_path: Path, object_store: ObjectStore, bucket_url: str) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    for name in ("a.txt", "b.txt"):
        (source / name).write_text("one", encoding="utf-8")
    url = streams.upload(object_store, bucket_url, source)
    folder = Path(fetch(url, "dataset.source", tmp_path / "cache", lambda _: None))
    # An object of the same size, and one object less.
    bucket = Bucket(url)
    bucket.put("a.txt", b"two")
    bucket.remove(["b.txt"])
    fetch(url, "dataset.source", tmp_path / "cache", lambda _: None)
    assert {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()} == {"a.txt": "two"}


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_list_in_a_bucket_is_fetched_with_the_files_next_to_it(
    suffix: str, tmp_path: Path, object_store: ObjectStore, bucket_url: str
) -> None:
    source = tmp_path / "listed"
    (source / "pictures").mkdir(parents=True)
    Image.new("RGB", (4, 4), "red").save(source / "pictures" / "a.png")
    rows = {"jsonl": '{"file_name": "pictures/a.png", "text": "one"}', "csv": "file_name,text\npictures/a.png,one"}
    (source / f"list.{suffix}").write_text(rows[suffix], encoding="utf-8")
    url = f"{streams.upload(object_store, bucket_url, source)}/list.{suffix}"
    path = fetch(url, "dataset.source", tmp_path / "cache", lambda _: None)
    opened = open_source(DatasetSpec(source=path), "train")
    assert [opened.captions(index) for index in range(len(opened))] == [("one",)]
    assert decode_sample(opened, 0).getpixel((0, 0)) == (255, 0, 0)
    missing = url.replace("list.", "other.")
    with pytest.raises(ConfigError, match=rf"^dataset\.source: nothing exists at {missing}; write the URL"):
        fetch(missing, "dataset.source", tmp_path / "cache", lambda _: None)


def test_missing_object_is_refused(tmp_path: Path, bucket_url: str) -> None:
    for name in ("nothing", "model.safetensors"):
        with pytest.raises(ConfigError, match=rf"model\.base: nothing exists at {bucket_url}/{name}; write the URL"):
            fetch(f"{bucket_url}/{name}", "model.base", tmp_path, lambda _: None)


def test_locations_outside_of_buckets_are_unchanged(tmp_path: Path) -> None:
    for location in ("/data", "owner/name", "./x.parquet"):
        assert fetch(location, "dataset.source", tmp_path, lambda _: None) == location
