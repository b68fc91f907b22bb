"""Bases and data sets in an object store, on a real S3 server."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_trainer.errors import ConfigError
from finetune_trainer.fetched import fetch
from testing.objectstore.server import ObjectStore
from testing.trainer import tiny
from testing.trainer.ranks import Ranks

pytestmark = pytest.mark.trainer


def put(store: ObjectStore, url: str, source: Path) -> str:
    """A folder of this machine as a folder of the bucket, which is a folder of the server."""
    target = store.folder / url.removeprefix("s3://") / source.name
    target.mkdir(parents=True)
    for path in sorted(source.rglob("*")):
        other = target / path.relative_to(source)
        if path.is_dir():
            other.mkdir(parents=True, exist_ok=True)
        else:
            other.write_bytes(path.read_bytes())
    return f"{url}/{source.name}"


def test_a_run_from_a_bucket_is_the_run_from_folders(
    base: Path, data: Path, tmp_path: Path, object_store: ObjectStore, bucket_url: str
) -> None:
    spec = tiny.make_spec(base, data, steps=1)
    plain = Ranks(spec, tmp_path / "plain" / "job")
    assert plain.run() == [ExitCode.DONE], plain.stderr()
    remote = spec.model_copy(
        update={
            "model": spec.model.model_copy(update={"base": put(object_store, bucket_url, base)}),
            "dataset": spec.dataset.model_copy(update={"source": put(object_store, bucket_url, data)}),
        }
    )
    ranks = Ranks(remote, tmp_path / "remote" / "job", world_size=2, extra=dict(object_store.environment))
    assert ranks.run() == [ExitCode.DONE] * 2, ranks.stderr()
    assert sorted(path.name for path in (tmp_path / "remote" / "cache" / "latents").iterdir())


def test_what_is_there_is_not_fetched_again(
    tmp_path: Path, object_store: ObjectStore, bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "words"
    source.mkdir()
    (source / "a.txt").write_text("one", encoding="utf-8")
    (source / "b.txt").write_text("two", encoding="utf-8")
    url = put(object_store, bucket_url, source)
    said: list[str] = []
    folder = Path(fetch(url, "dataset.source", tmp_path / "cache", said.append))
    assert said[-1] == "2/2 objects fetched"
    assert (folder / "a.txt").read_text(encoding="utf-8") == "one"
    before = (folder / "a.txt").stat().st_mtime_ns
    (folder / "b.txt").write_text("cut", encoding="utf-8")
    os.truncate(folder / "b.txt", 1)
    assert Path(fetch(url, "dataset.source", tmp_path / "cache", said.append)) == folder
    assert (folder / "a.txt").stat().st_mtime_ns == before
    assert (folder / "b.txt").read_text(encoding="utf-8") == "two"


def test_nothing_there_is_said(tmp_path: Path, bucket_url: str) -> None:
    for name in ("nothing", "model.safetensors"):
        with pytest.raises(ConfigError, match=rf"model\.base: there is nothing at {bucket_url}/{name}; write the URL"):
            fetch(f"{bucket_url}/{name}", "model.base", tmp_path, lambda _: None)


def test_other_locations_stay_as_they_are(tmp_path: Path) -> None:
    for location in ("/data", "owner/name", "./x.parquet"):
        assert fetch(location, "dataset.source", tmp_path, lambda _: None) == location
