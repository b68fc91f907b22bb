"""`finetune checkpoints`: the output for intact and damaged checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from finetune_contract import paths
from finetune_contract.bucket import Bucket
from finetune_contract.outputs.pictures import find_pictures
from finetune_operator.cli.commands.export import open_checkpoint
from finetune_operator.cli.errors import Exit
from finetune_operator.cli.main import main
from finetune_trainer.checkpoint.snapshot import Snapshot
from finetune_trainer.checkpoint.store.bucket import BucketStore
from finetune_trainer.checkpoint.store.folder import FolderStore
from finetune_trainer.checkpoint.store.retention import Retention


@pytest.fixture(name="job_dir")
def _job_dir(tmp_path: Path) -> Path:
    store = FolderStore(tmp_path, "uid", 1, Retention())
    store.open()
    for step in (2, 4):
        tensors = {
            "model": {"w": torch.full((2, 3), float(step))},
            "optimizer": {"w.exp_avg": torch.ones(3)},
        }
        store.save(Snapshot(step, tensors, {"losses": [1.0 / step], "step": step, "seed": 0}), 1e9)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["checkpoints", *arguments])
    assert isinstance(ended.value.code, int)
    out = capsys.readouterr()
    return ended.value.code, out.out + out.err


def damage(job_dir: Path, step: int) -> None:
    file = paths.checkpoints(job_dir) / f"step-{step:08d}-a1" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")


def test_list(job_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(job_dir, 4)
    store = FolderStore(job_dir, "uid", 2, Retention())
    store.open()
    store.choose(lambda _: None)
    code, text = run(capsys, "list", "--folder", str(job_dir))
    assert code == Exit.SUCCEEDED
    header, good, bad = text.splitlines()
    assert header.split() == ["NAME", "STEP", "ATTEMPT", "SIZE", "AGE", "STATE"]
    assert good.split()[:3] == ["step-00000002-a1", "2", "1"]
    assert good.endswith("committed")
    assert bad.startswith("corrupt-step-00000004-a1-1")
    assert bad.endswith("corrupt: model.safetensors does not match its SHA-256")
    assert run(capsys, "list", "--folder", str(job_dir / "checkpoints"))[1] == text


def test_verify(job_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "verify", "--folder", str(job_dir)) == (
        Exit.SUCCEEDED,
        "step-00000004-a1: intact\nstep-00000002-a1: intact\n",
    )
    damage(job_dir, 4)
    code, text = run(capsys, "verify", "--folder", str(job_dir))
    assert code == Exit.FAILED
    assert text.splitlines()[0] == ("step-00000004-a1: DAMAGED: model.safetensors does not match its SHA-256")
    assert run(capsys, "verify", "--folder", str(job_dir), "--checkpoint", "2")[0] == Exit.SUCCEEDED


def test_diff(job_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "diff", "--folder", str(job_dir), "--checkpoints", "2", "step-00000004-a1")
    assert code == Exit.SUCCEEDED
    assert text.splitlines() == [
        "step-00000002-a1 -> step-00000004-a1: +2 steps",
        "tensors with the same names and shapes in both: 2",
        "losses: mean 0.5 of 1 -> mean 0.25 of 1",
        "step: 2 -> 4",
        "identical files: optimizer.safetensors",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list"], "give the name of a job, or a folder with --folder"),
        (["list", "circles"], "no job circles in namespace default"),
        (["verify", "--folder", ".", "--checkpoint", "9"], "no checkpoint 9; existing checkpoints: none"),
    ],
)
def test_missing_jobs_and_checkpoints_are_reported(
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path))
    code, text = run(capsys, *arguments)
    assert code == Exit.USAGE
    assert message in text


def test_list_without_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "list", "--folder", str(tmp_path)) == (
        Exit.SUCCEEDED,
        f"No checkpoints in {tmp_path / 'checkpoints'}.\n",
    )


def test_checkpoints_of_a_bucket(bucket_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """List, verify and diff work as for a folder, and report a damaged checkpoint."""
    url = f"{bucket_url}/default/tiny"
    store = BucketStore(Bucket(url), tmp_path, "uid", 1, Retention())
    store.open()
    for step in (2, 4, 6):
        store.save(Snapshot(step, {"model": {"w": torch.full((2, 3), float(step))}}, {"step": step}), 1e9)
    assert run(capsys, "verify", "--folder", url) == (
        Exit.SUCCEEDED,
        "".join(f"step-0000000{step}-a1: intact\n" for step in (6, 4, 2)),
    )
    code, text = run(capsys, "diff", "--folder", url, "--checkpoints", "2", "4")
    assert code == Exit.SUCCEEDED
    assert "tensors with the same names and shapes in both: 1" in text
    assert "step: 2 -> 4" in text
    # -- an export downloads one checkpoint and the pictures of its step
    for step in (2, 4):
        Bucket(url).put(f"validation/pictures/step-{step:08}-00.png", b"picture")
    with open_checkpoint(url, 4, tmp_path / "state") as folder:
        assert (folder.name, any(folder.rglob("*model.safetensors"))) == ("step-00000004-a1", True)
    assert [path.name for path in find_pictures(tmp_path / "state")] == ["step-00000004-00.png"]
    bucket = Bucket(f"{url}/checkpoints")
    (name,) = (each for each in bucket.names() if "00000006" in each and each.endswith("model.safetensors"))
    bucket.put(name, b"damaged")
    code, text = run(capsys, "verify", "--folder", f"{url}/checkpoints", "--checkpoint", "6")
    assert code == Exit.FAILED
    assert "DAMAGED" in text
    store.choose(lambda _: None)
    lines = run(capsys, "list", "--folder", url)[1].splitlines()
    assert [line.split()[0] for line in lines] == [
        *("NAME", "step-00000004-a1", "step-00000002-a1", "corrupt-step-00000006-a1"),
    ]
    assert "corrupt: " in lines[-1]


def test_a_bucket_without_its_package_is_reported(
    bucket_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    code, text = run(capsys, "list", "--folder", "gs://models/x")
    assert code == Exit.USAGE
    assert "gs:// needs the Python package gcsfs" in text
    del bucket_url
