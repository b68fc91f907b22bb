"""The S3 server of the tests: Versity's gateway for a local folder, as a process on the loopback interface."""

from __future__ import annotations

import dataclasses
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from testing.controlplane.build import S3_SERVER, ensure_programs
from testing.controlplane.process import LOOPBACK, Guard, Program, free_ports, wait_for

ACCESS_KEY = "tests"
SECRET_KEY = "not-a-secret"


@dataclass(frozen=True)
class ObjectStore:
    """A running server.

    Attributes:
        folder: its subfolders are the buckets.
        program: its process; a test may stop it and start it again.
        environment: variables that a client process needs to reach it.
    """

    folder: Path
    program: Program
    environment: Mapping[str, str]

    def make_bucket(self, name: str) -> str:
        """Create a bucket and return its URL."""
        (self.folder / name).mkdir()
        return f"s3://{name}"


def start(folder: Path, guard: Guard, *, read_only: bool = False) -> ObjectStore:
    """Start the server, after building it if it is not in the cache, and wait until it answers.

    Args:
        folder: for its buckets and its log.
        guard: ends it at the latest.
        read_only: whether it refuses all writes.
    """
    program_path = ensure_programs(modules=[S3_SERVER])["versitygw"]
    (port,) = free_ports(1)
    buckets = folder / "buckets"
    # Separate from the buckets, so that file systems without extended attributes (container overlays) work too.
    metadata = folder / "metadata"
    for each in (buckets, metadata):
        each.mkdir()
    command = [str(program_path), "--access", ACCESS_KEY, "--secret", SECRET_KEY, "--port", f"{LOOPBACK}:{port}"]
    if read_only:
        command.append("--readonly")
    program = Program(
        "versitygw", [*command, "posix", "--sidecar", str(metadata), str(buckets)], folder / "versitygw.log", guard
    )
    program.start()
    environment = {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_ENDPOINT_URL": f"http://{LOOPBACK}:{port}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    store = ObjectStore(buckets, program, environment)
    wait_for("the S3 server answers", lambda: program.has_exited or answers(environment["AWS_ENDPOINT_URL"]))
    if program.has_exited:
        raise RuntimeError("\n".join(program.tail()))
    return store


def answers(url: str) -> bool:
    """Return whether an HTTP server answers, if only with an error."""
    try:
        with urllib.request.urlopen(url, timeout=1):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def without_credentials(store: ObjectStore) -> ObjectStore:
    """Return the same server for a client without keys."""
    kept = {name: value for name, value in store.environment.items() if "KEY" not in name}
    return dataclasses.replace(store, environment={**kept, "HOME": os.devnull})
