"""A standby pod reads the model's files."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from finetune_trainer.supervisor.read_ahead import read_ahead


def read_bytes(thread_io: str) -> int:
    return int(dict(line.split(": ") for line in Path(thread_io).read_text().splitlines())["rchar"])


def test_all_readable_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "weights").write_bytes(b"x" * 3_000_000)
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    (tmp_path / "config").write_bytes(b"x" * 1000)
    before = read_bytes("/proc/self/io")
    read_ahead(str(tmp_path)).join()
    assert read_bytes("/proc/self/io") - before >= 3_001_000


def test_a_hub_id_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    before = read_bytes("/proc/self/io")
    read_ahead("stabilityai/stable-diffusion-2-1").join()
    assert errors == []
    assert read_bytes("/proc/self/io") - before < 3_000_000
