"""Writes the tiny data set in all layouts that can be streamed, and runs their map phase in this process."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pyarrow import parquet

from finetune_contract.run_spec import RunSpec
from finetune_trainer.data.captions import OwnCaptions
from finetune_trainer.data.prepare import DataRequirements, Preparation, PreparedData
from finetune_trainer.distributed.world import World
from finetune_trainer.models.base import open_base
from testing.objectstore.server import ObjectStore


def rows_of(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    """Return the samples of a folder with metadata.jsonl as rows of a table, with the columns of fill50k."""
    lines = (folder / split / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {
            "image": {"bytes": (folder / split / row["file_name"]).read_bytes(), "path": row["file_name"]},
            "conditioning_image": {"bytes": (folder / split / row["edges"]).read_bytes(), "path": row["edges"]},
            "text": row["text"],
        }
        for row in map(json.loads, lines)
    ]


def write_parquet(path: Path, rows: list[dict[str, Any]], group_rows: int = 3) -> Path:
    """Write a .parquet file with several row groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=group_rows)
    return path


def write_hub_folder(folder: Path, data: Path) -> Path:
    """Write a folder with the layout of a data set of the hub: a card, and files of each split."""
    rows = rows_of(data)
    write_parquet(folder / "data" / "train-00000-of-00002.parquet", rows[:4])
    write_parquet(folder / "data" / "train-00001-of-00002.parquet", rows[4:])
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", rows_of(data, "test"))
    card = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*}
  - {split: test, path: data/test-*}
---
"""
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def write_tar(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write a .tar file as WebDataset does: the names of the files of a sample have the same stem."""
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(rows):
            for suffix, data in (("png", row["image"]["bytes"]), ("txt", row["text"].encode())):
                info = tarfile.TarInfo(f"{number:05d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def upload(store: ObjectStore, url: str, source: Path) -> str:
    """Copy a folder into a bucket, which is a folder of the server. Return its URL."""
    target = store.folder / url.removeprefix("s3://") / source.name
    target.mkdir(parents=True)
    for path in sorted(source.rglob("*")):
        other = target / path.relative_to(source)
        if path.is_dir():
            other.mkdir(parents=True, exist_ok=True)
        else:
            other.write_bytes(path.read_bytes())
    return f"{url}/{source.name}"


def streamed(spec: RunSpec, source: Path | str | None = None, **dataset: Any) -> RunSpec:
    """Return the run with its data set, or another one, streamed."""
    update = {"streaming": True, "source": str(source or spec.dataset.source), **dataset}
    return spec.model_copy(update={"dataset": spec.dataset.model_copy(update=update)})


def prepare(spec: RunSpec, cache: Path, reports: list[str] | None = None, conditioning: bool = False) -> PreparedData:
    """Run the map phase of a run on one rank. The lines on its progress are appended to `reports`."""
    world = World(0, 1, 0, torch.device("cpu"))
    requirements = DataRequirements(OwnCaptions(), conditioning=conditioning)
    family = open_base(spec.model)
    report = (reports if reports is not None else []).append
    return Preparation(spec, requirements, family, world, torch.float32, cache, report, report).run()
