"""Real disks that are full, read-only or not readable: small file systems in memory, mounted for a test."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_contract import paths
from finetune_trainer.checkpoint.store.folder import FolderStore
from finetune_trainer.checkpoint.store.retention import Retention
from finetune_trainer.errors import StaleError
from testing.trainer import tiny
from tests.trainer.checkpoint.test_checkpointer import Loop, names

NOBODY = 65534
UID = tiny.make_spec(Path("b"), Path("d")).uid
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")


@pytest.fixture
def disk() -> Iterator[Path]:
    """A disk of 1 MiB; a checkpoint of the loop takes an eighth of it."""
    folder = Path(tempfile.mkdtemp(prefix="disk-"))
    folder.chmod(0o755)
    mount("-t", "tmpfs", "-o", "size=1m,mode=755", "tmpfs", str(folder))
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
    shutil.rmtree(folder)


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


@needs_root
def test_a_disk_without_room(disk: Path) -> None:
    """Saves fail and leave nothing half written; when there is room again they succeed."""
    loop = Loop(disk / "job")
    loop.step()
    loop.settle()
    with (disk / "fill").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    loop.step()
    loop.settle()
    loop.step()
    assert "No space left on device" in loop.error
    assert names(disk / "job") == ["step-00000001-a1"]
    (disk / "fill").unlink()
    loop.clock.now = 10
    loop.step()
    loop.settle()
    loop.step()
    assert loop.error == ""
    # The last step, which took the news of that save, has begun another one.
    loop.settle()
    assert names(disk / "job") == ["step-00000004-a1", "step-00000005-a1"]


@needs_root
def test_a_disk_that_turns_read_only(disk: Path) -> None:
    loop = Loop(disk / "job", max_stale_seconds=100)
    loop.step()
    loop.settle()
    mount("-o", "remount,ro", str(disk))
    loop.step()
    loop.settle()
    loop.step()
    assert "Read-only file system" in loop.error
    loop.clock.now = 90
    loop.step()
    loop.settle()
    loop.step()
    loop.clock.now = 101
    with pytest.raises(StaleError, match="Read-only file system"):
        loop.step()
    # What is there can be read all the same.
    chosen = FolderStore(disk / "job", UID, 1, Retention()).choose(pytest.fail)
    assert chosen is not None
    assert chosen.manifest.step == 1


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Root may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@needs_root
@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_a_file_that_may_not_be_read_is_left_alone(disk: Path, name: str) -> None:
    """It may be whole: it is passed over, and not set aside."""
    loop = Loop(disk / "job")
    for _ in range(2):
        loop.step()
        loop.settle()
    newest = paths.checkpoints(disk / "job") / "step-00000002-a1"
    (newest / name).chmod(0)
    warnings: list[str] = []
    with as_nobody():
        chosen = FolderStore(disk / "job", UID, 1, Retention()).choose(warnings.append)
    assert chosen is not None
    assert chosen.manifest.step == 1
    assert warnings == [f"checkpoint step-00000002-a1 is skipped: {name} cannot be read: Permission denied"]
    assert names(disk / "job") == ["step-00000001-a1", "step-00000002-a1"]
