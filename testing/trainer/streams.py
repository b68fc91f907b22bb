"""Data sets in the forms that can be streamed, made from the tiny one, and their map phase within this process."""

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
from finetune_trainer.data.prepare import Demand, Preparation, PreparedData
from finetune_trainer.distributed.world import World
from finetune_trainer.models.base import open_base

FILL50K = {"image": "image", "caption": "text", "conditioning": "conditioning_image"}
"""Names of the columns of ControlNet's circles on the hub."""


def rows_of(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    """The samples of a folder with metadata.jsonl as rows of a table in the fill50k form."""
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
    """One file of several row groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=group_rows)
    return path


def write_hub_folder(folder: Path, data: Path) -> Path:
    """What a data set of the hub looks like: a card, and files of each split."""
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
    """A tar as WebDataset's: the files of a sample share their name's beginning."""
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(rows):
            for suffix, data in (("png", row["image"]["bytes"]), ("txt", row["text"].encode())):
                about = tarfile.TarInfo(f"{number:05d}.{suffix}")
                about.size = len(data)
                tar.addfile(about, io.BytesIO(data))
    return path


def streamed(spec: RunSpec, source: Path | str | None = None, **dataset: Any) -> RunSpec:
    """The run with its data set, or another, streamed."""
    update = {"streaming": True, "source": str(source or spec.dataset.source), **dataset}
    return spec.model_copy(update={"dataset": spec.dataset.model_copy(update=update)})


def prepare(spec: RunSpec, cache: Path, said: list[str] | None = None, conditioning: bool = False) -> PreparedData:
    """The map phase of a run on one rank."""
    world = World(0, 1, 0, torch.device("cpu"))
    demand = Demand(OwnCaptions(), conditioning=conditioning)
    family = open_base(spec.model)
    say = (said if said is not None else []).append
    return Preparation(spec, demand, family, world, torch.float32, cache, say, say).run()
