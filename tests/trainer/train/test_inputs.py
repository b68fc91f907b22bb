"""A base or a data set that changes during a job: the pinned commit is read, and other changes end the attempt."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_contract import paths
from finetune_contract.exit_codes import ExitCode
from finetune_contract.run_spec import RunSpec
from testing import hub
from testing.hub import HubServer
from testing.trainer import tiny
from testing.trainer.ranks import Ranks

pytestmark = pytest.mark.trainer

FIRST, ALL = 2, 4
"""Steps of the first attempt, and of the job."""


def with_steps(spec: RunSpec, steps: int) -> RunSpec:
    return spec.model_copy(update={"training": spec.training.model_copy(update={"steps": steps})})


def run(
    spec: RunSpec,
    folder: Path,
    attempt: int = 1,
    code: ExitCode = ExitCode.DONE,
    environment: Mapping[str, str] | None = None,
) -> Ranks:
    """Run an attempt until it ends with an exit code."""
    ranks = Ranks(spec, folder, attempt, extra=environment or {})
    assert ranks.run() == [code], ranks.stderr()
    return ranks


def inputs(ranks: Ranks) -> dict[str, dict[str, object]]:
    """Return what an attempt reported of the base and the data, by field."""
    return {each["field"]: each for each in ranks.reports()[-1]["inputs"]}


def write_table(source: Path, folder: Path) -> Path:
    """Write a folder of images as a data set of the hub: one .parquet file."""
    import datasets  # noqa: PLC0415  slow to import

    rows = [json.loads(line) for line in (source / "train" / "metadata.jsonl").read_text("utf-8").splitlines()]
    files = [{"bytes": (source / "train" / row["file_name"]).read_bytes(), "path": None} for row in rows]
    table = datasets.Dataset.from_dict({"image": files, "text": [row["text"] for row in rows]})
    (folder / "data").mkdir(parents=True)
    table.cast_column("image", datasets.Image(decode=False)).to_parquet(folder / "data" / "train.parquet")
    return folder


def other_base(base: Path, folder: Path) -> Path:
    """Write a base that has other weights of the same shapes."""
    shutil.copytree(base, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value * 1.01 for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    return folder


@pytest.fixture(name="server", scope="module")
def _server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """Return a hub with two commits of a base and of a data set, whose releases have 8 and 5 rows."""
    folder = tmp_path_factory.mktemp("hub")
    with hub.serve(folder / "repositories") as server:
        for name, source in (("new", other_base(base, folder / "new-base")), ("old", base)):
            server.publish("models", "me/base", source, name)
        for name, num_rows in (("new", 5), ("old", 8)):
            images = tiny.write_data(folder / f"{name}-images", num_rows)
            server.publish("datasets", "me/data", write_table(images, folder / f"{name}-data"), name)
        # The hub answers for repositories with a main branch only.
        server.publish("datasets", "me/data", folder / "new-data")
        yield server


def release(server: HubServer, commits: str) -> None:
    """Move the main branch of the base, and the branch "release" of the data set, to other commits."""
    for kind, name, branch in (("models", "me/base", "main"), ("datasets", "me/data", "release")):
        commit = server.commit_of(kind, name, commits)
        assert commit is not None
        server.move(kind, name, commit, branch)


@pytest.fixture(name="hub_spec", scope="module")
def _hub_spec(base: Path) -> RunSpec:
    spec = tiny.make_spec(base, Path("unused"), steps=ALL)
    return spec.model_copy(
        update={
            "model": spec.model.model_copy(update={"base": "me/base"}),
            "dataset": spec.dataset.model_copy(update={"source": "me/data", "revision": "release"}),
        }
    )


def test_moved_branch_does_not_change_a_job(server: HubServer, hub_spec: RunSpec, base: Path, tmp_path: Path) -> None:
    release(server, "old")
    undisturbed = run(tiny.make_spec(base, tiny.write_data(tmp_path / "data", 8), steps=ALL), tmp_path / "undisturbed")
    first = run(with_steps(hub_spec, FIRST), tmp_path / "job", environment=server.environment)
    release(server, "new")
    # Another node: its cache has nothing of the hub.
    shutil.rmtree(tmp_path / "cache")
    second = run(hub_spec, tmp_path / "job", 2, environment=server.environment)
    assert second.weights() == undisturbed.weights()
    commits = {field: each["commit"] for field, each in inputs(second).items()}
    assert commits == {
        "model.base": server.commit_of("models", "me/base", "old"),
        "dataset.source": server.commit_of("datasets", "me/data", "old"),
    }
    assert inputs(second) == inputs(first)
    assert inputs(second)["dataset.source"]["samples"] == 8


@pytest.fixture(name="undisturbed", scope="module")
def _undisturbed(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the weights of a job on the local base and data."""
    return run(tiny.make_spec(base, data, steps=ALL), tmp_path_factory.mktemp("jobs") / "undisturbed").weights()


def test_edited_folder_ends_the_job_until_it_is_restored(
    base: Path, data: Path, undisturbed: bytes, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    spec = tiny.make_spec(base, folder, steps=ALL)
    run(with_steps(spec, FIRST), tmp_path / "job")
    edited = folder / "train" / "metadata.jsonl"
    before, times = edited.read_text("utf-8"), edited.stat()
    # An edit that keeps size and modification time.
    edited.write_text(before.replace("picture 3", "drawing 3"), "utf-8")
    os.utime(edited, ns=(times.st_atime_ns, times.st_mtime_ns))
    second = run(spec, tmp_path / "job", 2, ExitCode.DATA)
    assert f"dataset.source: {folder} has changed since the job began: contents " in second.stderr()
    assert f"first difference: {folder / 'train' / '3.png'}; restore" in second.stderr()
    edited.write_text("".join(before.splitlines(keepends=True)[:5]), "utf-8")
    third = run(spec, tmp_path / "job", 3, ExitCode.DATA)
    assert "has changed since the job began: rows 7 -> 5; first difference: row 5 is missing; restore" in third.stderr()
    # Without its pins, an attempt compares what it finds with the checkpoint.
    shutil.move(third.job_dir / paths.INPUTS, tmp_path / "pins")
    fourth = run(spec, tmp_path / "job", 4, ExitCode.CONFIG)
    assert f"dataset.source: {folder} has changed: rows 7 -> 5; restore" in fourth.stderr()
    assert "create another job with checkpoint.from: {job: tiny}" in fourth.stderr()
    shutil.rmtree(third.job_dir / paths.INPUTS)
    shutil.move(tmp_path / "pins", third.job_dir / paths.INPUTS)
    edited.write_text(before, "utf-8")
    # Images are compared in the background, before the first step.
    image = folder / "train" / "2.png"
    pixels, times = image.read_bytes(), image.stat()
    image.write_bytes((folder / "train" / "1.png").read_bytes().ljust(len(pixels), b"\0")[: len(pixels)])
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    fifth = run(spec, tmp_path / "job", 5, ExitCode.DATA)
    assert f"has changed since the job began: contents differ; first difference: {image}; restore" in fifth.stderr()
    image.write_bytes(pixels)
    assert run(spec, tmp_path / "job", 6).weights() == undisturbed


def test_ranks_without_a_shared_disk_share_the_pins(base: Path, data: Path, tmp_path: Path) -> None:
    """The node of rank 0 was replaced: its disk has neither pins nor checkpoints."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    spec = tiny.make_spec(base, folder, steps=ALL, centerCrop=True)
    spec = spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"streaming": True})})
    first = Ranks(with_steps(spec, FIRST), tmp_path / "job", world_size=2, own_disks=True)
    assert first.run() == [ExitCode.DONE] * 2, first.stderr()
    shutil.rmtree(first.disk(0))
    edited = folder / "train" / "metadata.jsonl"
    edited.write_text(edited.read_text("utf-8").replace("picture 3", "drawing 3"), "utf-8")
    second = Ranks(spec, tmp_path / "job", 2, world_size=2, own_disks=True)
    assert second.run() == [ExitCode.DATA] * 2, second.stderr()
    assert f"first difference: {folder}/train/3.png; restore" in second.stderr(0)


def test_edited_base_ends_the_job(base: Path, data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    spec = tiny.make_spec(copy, data, steps=ALL)
    run(with_steps(spec, FIRST), tmp_path / "job")
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    times = weights.stat()
    tensors = load_file(weights)
    save_file({**tensors, "conv_in.bias": torch.zeros(8)}, weights, {"format": "pt"})
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    second = run(spec, tmp_path / "job", 2, ExitCode.CONFIG)
    assert f"model.base: {copy} has changed since the job began: contents " in second.stderr()
    assert "; first changed file: unet/diffusion_pytorch_model.safetensors; restore" in second.stderr()


def test_checkpoint_without_identities_is_accepted(base: Path, data: Path, undisturbed: bytes, tmp_path: Path) -> None:
    """Checkpoints of older releases have no identities, and no pins next to them."""
    spec = tiny.make_spec(base, data, steps=ALL)
    ranks = run(with_steps(spec, FIRST), tmp_path / "job", environment={"TEST_OLD_CHECKPOINTS": "1"})
    shutil.rmtree(ranks.job_dir / paths.INPUTS)
    (state,) = ranks.job_dir.glob("checkpoints/*/state.json")
    assert "inputs" not in json.loads(state.read_bytes())
    assert run(spec, tmp_path / "job", 2).weights() == undisturbed
