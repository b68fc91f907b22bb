"""Speed of delivering an output to a real S3 server on the loopback, beside a plain copy of the same bytes.

Both read the same files from the page cache and end when the bytes are on the disk of this machine.

Last line: {"upload_over_copy": ..., "upload_mb_s": ..., "copy_mb_s": ..., "bytes": ...}
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from finetune_contract.outputs.spec import OutputSpec
from finetune_trainer.delivery.open import DeliveryPlace
from finetune_trainer.export.outputs import Export, deliver_outputs
from testing.controlplane.process import Guard
from testing.objectstore import server

MB = 1_000_000


def main() -> None:
    """Measure both in turn, print each round, and the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    guard = Guard()
    with tempfile.TemporaryDirectory(prefix="upload-") as name:
        folder = Path(name)
        try:
            (folder / "s3").mkdir()
            store = server.start(folder / "s3", guard)
            os.environ.update(store.environment)
            url = store.make_bucket("models")
            source = folder / "model.safetensors"
            source.write_bytes(os.urandom(MB) * arguments.megabytes)
            copies, uploads = [], []
            for number in range(arguments.rounds):
                copies.append(_seconds(lambda: _copy(source, folder / "copy")))
                uploads.append(_seconds(partial(_upload, source, f"{url}/{number}", folder / "job")))
                print(f"round {number + 1}: copy {copies[-1]:.2f} s, upload {uploads[-1]:.2f} s", flush=True)
        finally:
            guard.close()
    copy, upload = statistics.median(copies), statistics.median(uploads)
    print(f"{'':8}{'seconds':>10}{'MB/s':>8}")
    for label, seconds in (("copy", copy), ("upload", upload)):
        print(f"{label:8}{seconds:10.2f}{arguments.megabytes / seconds:8.0f}")
    figures = {
        "upload_over_copy": round(upload / copy, 2),
        "upload_mb_s": round(arguments.megabytes / upload),
        "copy_mb_s": round(arguments.megabytes / copy),
        "bytes": arguments.megabytes * MB,
    }
    print(json.dumps(figures))


def _seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())


def _upload(source: Path, url: str, job_dir: Path) -> None:
    """Deliver the file; a hard link stands for writing it."""

    def write(_: OutputSpec, folder: Path) -> Iterable[Path]:
        (folder / source.name).hardlink_to(source)
        return [folder / source.name]

    deliver_outputs(write, [OutputSpec.model_validate({"format": "kohya", "to": url})], Export(DeliveryPlace(job_dir)))


if __name__ == "__main__":
    main()
