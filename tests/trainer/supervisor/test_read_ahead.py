"""A pod that stands by reads the model's files."""

from __future__ import annotations

from pathlib import Path

from finetune_trainer.supervisor.read_ahead import read_ahead


def cached_bytes(thread_io: str) -> int:
    return int(dict(line.split(": ") for line in Path(thread_io).read_text().splitlines())["rchar"])


def test_it_reads_all_files_and_stops_at_none(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "weights").write_bytes(b"x" * 3_000_000)
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    (tmp_path / "config").write_bytes(b"x" * 1000)
    before = cached_bytes("/proc/self/io")
    read_ahead(str(tmp_path)).join()
    assert cached_bytes("/proc/self/io") - before >= 3_001_000


def test_a_hub_id_is_nobodys_folder() -> None:
    read_ahead("stabilityai/stable-diffusion-2-1").join()
