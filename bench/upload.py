"""Speed of delivering an output to a real S3 server on the loopback, beside a plain copy and another client.

All read the same file from the page cache. curl sends it in one request without any hash, so that its time is mostly
that of the server; a delivery also records the SHA-256 of the file, and each of its parts is hashed. The CPU seconds of
both sides show which one bounds the speed.

Last line: {"upload_over_copy": ..., "upload_over_curl": ..., "client_cpu_s": ..., "server_cpu_s": ..., ...}
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import psutil

from finetune_contract.outputs.spec import OutputSpec
from finetune_trainer.delivery.open import DeliveryPlace
from finetune_trainer.export.outputs import Export, deliver_outputs
from testing.controlplane.process import Guard
from testing.objectstore import server
from testing.objectstore.server import ACCESS_KEY, SECRET_KEY, ObjectStore

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
            rounds: list[dict[str, float]] = []
            for number in range(arguments.rounds):
                before = time.process_time(), _cpu_seconds(store)
                upload = _seconds(partial(_upload, source, f"{url}/{number}", folder / "job"))
                after = time.process_time(), _cpu_seconds(store)
                rounds.append(
                    {
                        "copy": _seconds(lambda: _copy(source, folder / "copy")),
                        "curl": _seconds(partial(_curl, store, source, number)),
                        "upload": upload,
                        "client_cpu": after[0] - before[0],
                        "server_cpu": after[1] - before[1],
                    }
                )
                print(f"round {number + 1}: " + ", ".join(f"{key} {each:.2f} s" for key, each in rounds[-1].items()))
        finally:
            guard.close()
    found = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
    print(f"{'':8}{'seconds':>10}{'MB/s':>8}")
    for label in ("copy", "curl", "upload"):
        print(f"{label:8}{found[label]:10.2f}{arguments.megabytes / found[label]:8.0f}")
    figures = {
        "upload_over_copy": round(found["upload"] / found["copy"], 2),
        "upload_over_curl": round(found["upload"] / found["curl"], 2),
        **{f"{label}_mb_s": round(arguments.megabytes / found[label]) for label in ("upload", "curl", "copy")},
        "client_cpu_s": round(found["client_cpu"], 2),
        "server_cpu_s": round(found["server_cpu"], 2),
        "bytes": arguments.megabytes * MB,
    }
    print(json.dumps(figures))


def _cpu_seconds(store: ObjectStore) -> float:
    """Return the CPU time that the server has used."""
    times = psutil.Process(store.program.pid).cpu_times()
    return float(times.user + times.system)


def _curl(store: ObjectStore, source: Path, number: int) -> None:
    """Send the file in one request, whose signature contains no hash of it."""
    url = f"{store.environment['AWS_ENDPOINT_URL']}/models/curl-{number}"
    command = ["curl", "--silent", "--show-error", "--fail", "--user", f"{ACCESS_KEY}:{SECRET_KEY}"]
    command += ["--aws-sigv4", "aws:amz:us-east-1:s3", "--header", "x-amz-content-sha256: UNSIGNED-PAYLOAD"]
    subprocess.run([*command, "--upload-file", str(source), url], stdout=subprocess.DEVNULL, check=True)


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
