"""Real disks that are full, read-only or unreadable: small in-memory file systems that each test mounts."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from finetune_contract import paths
from finetune_contract.exit_codes import ExitCode
from finetune_contract.outputs.spec import OutputSpec
from finetune_trainer.checkpoint.store.folder import FolderStore
from finetune_trainer.checkpoint.store.retention import Retention
from finetune_trainer.delivery.open import DeliveryPlace
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import StaleError, StorageError
from finetune_trainer.export.outputs import check_targets
from finetune_trainer.train.checks import check_place
from testing.trainer import tiny
from tests.trainer.checkpoint.test_checkpointer import LoopHarness, names

NOBODY = 65534
UID = tiny.make_spec(Path("b"), Path("d")).uid
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")


@pytest.fixture
def disk() -> Iterator[Path]:
    """Mount a disk of 1 MiB; a checkpoint of the harness takes an eighth of it."""
    folder = Path(tempfile.mkdtemp(prefix="disk-"))
    folder.chmod(0o755)
    mount("-t", "tmpfs", "-o", "size=1m,mode=755", "tmpfs", str(folder))
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
    shutil.rmtree(folder)


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


@needs_root
def test_full_disk_fails_saves_until_space_is_free(disk: Path) -> None:
    """Saves fail and leave no incomplete checkpoint; they succeed again when space is free."""
    harness = LoopHarness(disk / "job")
    harness.step()
    harness.settle()
    with (disk / "fill").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    harness.step()
    harness.settle()
    harness.step()
    assert "No space left on device" in harness.error
    assert names(disk / "job") == ["step-00000001-a1"]
    (disk / "fill").unlink()
    harness.clock.now = 10
    harness.step()
    harness.settle()
    harness.step()
    assert harness.error == ""
    # The last step collected the result of that save and started another one.
    harness.settle()
    assert names(disk / "job") == ["step-00000004-a1", "step-00000005-a1"]


@needs_root
def test_read_only_disk_stops_training_at_the_staleness_limit(disk: Path) -> None:
    harness = LoopHarness(disk / "job", max_stale_seconds=100)
    harness.step()
    harness.settle()
    mount("-o", "remount,ro", str(disk))
    harness.step()
    harness.settle()
    harness.step()
    assert "Read-only file system" in harness.error
    harness.clock.now = 90
    harness.step()
    harness.settle()
    harness.step()
    harness.clock.now = 101
    with pytest.raises(StaleError, match="Read-only file system"):
        harness.step()
    # Existing checkpoints can still be read.
    chosen = FolderStore(disk / "job", UID, 1, Retention()).choose(pytest.fail)
    assert chosen is not None
    assert chosen.manifest.step == 1


@contextlib.contextmanager
def as_unprivileged_user() -> Iterator[None]:
    """Run the block as an unprivileged user, because root can read every file."""
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@needs_root
@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_checkpoint_with_an_unreadable_file_is_skipped(disk: Path, name: str) -> None:
    """The checkpoint may be valid: it is skipped, and not renamed."""
    harness = LoopHarness(disk / "job")
    for _ in range(2):
        harness.step()
        harness.settle()
    newest = paths.checkpoints(disk / "job") / "step-00000002-a1"
    (newest / name).chmod(0)
    warnings: list[str] = []
    with as_unprivileged_user():
        chosen = FolderStore(disk / "job", UID, 1, Retention()).choose(warnings.append)
    assert chosen is not None
    assert chosen.manifest.step == 1
    assert warnings == [f"checkpoint step-00000002-a1 is skipped: {name} cannot be read: Permission denied"]
    assert names(disk / "job") == ["step-00000001-a1", "step-00000002-a1"]


@needs_root
def test_an_output_on_a_read_only_disk_is_not_refused_for_good(disk: Path) -> None:
    """The kernel makes a file system read-only after an error; the next attempt may run on another node."""
    mount("-o", "remount,ro", str(disk))
    outputs = [OutputSpec(format="diffusers", to=str(disk / "lora"))]
    with pytest.raises(
        StorageError, match=r"outputs\[0\]\.to: cannot write to .*lora: Read-only file system"
    ) as raised:
        check_targets(outputs, DeliveryPlace(disk))
    assert raised.value.code is ExitCode.STORAGE


@needs_root
def test_a_read_only_cache_is_named(disk: Path) -> None:
    mount("-o", "remount,ro", str(disk))
    spec = tiny.make_spec(Path("b"), Path("d"))
    context = SimpleNamespace(spec=spec, cache_dir=disk)
    with pytest.raises(StorageError, match=r"cache: cannot write .*: Read-only file system"):
        check_place(context, World(0, 1, 0, torch.device("cpu")))  # type: ignore[arg-type]
