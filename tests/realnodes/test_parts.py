"""Parts of the cluster test that need no cluster: tables, refusals, image checks, cleanup."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from finetune_operator.api.reasons import Reason
from testing.controlplane.process import wait_for
from testing.realnodes import archive, cleanup, layers, security
from testing.realnodes.builder import OWN_MOUNTS, unmount_below
from testing.realnodes.faults import FAULTS
from testing.realnodes.job import FAULT_STEP, LONG_STEPS, SAVE_EVERY, STEPS

ROOT = Path(__file__).parents[2]


def test_expected_causes_are_reasons_of_the_ledger() -> None:
    reasons = {reason.value for reason in Reason}
    for name, fault in FAULTS.items():
        assert fault.causes <= reasons, name
    assert len(FAULTS) == 10


def test_a_fault_is_injected_between_two_checkpoints_and_before_the_last_one() -> None:
    assert FAULT_STEP % SAVE_EVERY
    assert FAULT_STEP < STEPS - SAVE_EVERY < LONG_STEPS


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "testing.realnodes", *arguments]
    given = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)


def test_an_unknown_fault_is_refused_with_a_list_of_faults() -> None:
    result = run("--faults", "earthquake")
    assert result.returncode == 2
    assert "kubectl drain" in result.stderr


def test_missing_tools_and_settings_are_reported() -> None:
    """Tools are missing on PATH, or the settings of a user cluster are wrong."""
    result = run(PATH="/nowhere", KUBECONFIG="")
    assert result.stderr.startswith("SKIPPED: ")
    images = {"FINETUNE_OPERATOR_IMAGE": "a:b", "FINETUNE_TRAINER_IMAGE": "c:d"}
    for given, message in (
        (images, "KUBECONFIG: set it to a kubeconfig with administrator access"),
        ({}, "FINETUNE_OPERATOR_IMAGE: set it to name:tag"),
    ):
        result = run(KUBECONFIG="/nowhere", **given)
        assert result.returncode == 1
        assert result.stderr.startswith(message)


CHILD = """
import os, sys
from testing.realnodes.cleanup import CleanupProcess, folder_of
with CleanupProcess():
    folder_of(os.getpid()).mkdir()
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("by", [signal.SIGKILL, None], ids=["killed", "ended"])
def test_cleanup_removes_the_folder_of_an_ended_or_killed_run(by: signal.Signals | None) -> None:
    command, pipe = [sys.executable, "-c", CHILD], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, text=True, stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        folder = cleanup.folder_of(int(process.stdout.readline()))
        assert folder.is_dir()
        if by is not None:
            process.send_signal(by)
        process.communicate()
        wait_for("the folder is removed", lambda: not folder.exists())


def test_differences_from_the_expected_access_are_reported() -> None:
    assert list(security.find_differences(dict(security.EXPECTED))) == []
    found = {**security.EXPECTED, "read the API, its token": 200}
    assert list(security.find_differences(found)) == ["read the API, its token: 200 instead of 401"]


def image(path: Path, files: dict[str, bytes], user: str) -> Path:
    labels = {f"org.opencontainers.image.{label}": "x" for label in archive.LABELS}
    layer = pack(files)
    config = json.dumps({"config": {"User": user, "Labels": labels}}).encode()
    manifest = json.dumps([{"Config": "config.json", "Layers": ["layer.tar"]}]).encode()
    path.write_bytes(pack({"manifest.json": manifest, "config.json": config, "layer.tar": layer}))
    return path


def pack(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as opened:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            opened.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


SBOM = {"usr/share/sbom/x.spdx.json": b"{}"}


@pytest.mark.parametrize(
    ("files", "user", "messages"),
    [
        (SBOM, "65532:65532", []),
        ({}, "65532", ["has no SBOM"]),
        (SBOM, "0:0", ["runs as root"]),
        (SBOM, "", ["runs as root"]),
        ({**SBOM, "app/torch/__init__.py": b""}, "1", ["contains app/torch/"]),
        ({**SBOM, "usr/bin/sh": b""}, "1", ["contains usr/bin/sh"]),
        ({**SBOM, "large": bytes(151 << 20)}, "1", ["151 MiB"]),
    ],
    ids=range(7),
)
def test_image_defects_are_found(tmp_path: Path, files: dict[str, bytes], user: str, messages: list[str]) -> None:
    defects = list(archive.find_defects(image(tmp_path / "image.tar", files, user), "operator"))
    assert len(defects) == len(messages)
    for defect, message in zip(defects, messages, strict=True):
        assert message in defect


def test_an_archive_omits_blobs_that_are_present(tmp_path: Path) -> None:
    """After a code change, nodes unpack one layer."""
    layout, present = tmp_path / "layout", tmp_path / "present"
    for folder, blobs in ((layout / layers.BLOBS, ("dependencies", "own")), (present, ("dependencies", "older"))):
        folder.mkdir(parents=True)
        for blob in blobs:
            (folder / blob).write_text(blob)
    (layout / "oci-layout").write_text("{}")
    named = {"annotations": {"org.opencontainers.image.ref.name": "localhost/trainer:test"}}
    (layout / "index.json").write_text(json.dumps({"manifests": [named]}))
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as opened:
        layers.pack(layout, present, opened)
    packed.seek(0)
    with tarfile.open(fileobj=packed) as opened:
        assert set(opened.getnames()) == {"oci-layout", "index.json", f"{layers.BLOBS}/own"}
        index = opened.extractfile("index.json")
        assert index is not None
        assert json.load(index)["manifests"][0]["annotations"][layers.NAME] == "localhost/trainer:test"


def test_the_mounts_of_a_killed_build_end_with_it(tmp_path: Path) -> None:
    """An interrupted build must not leave the mounts of buildah on this machine."""
    if os.geteuid() != 0 or subprocess.run([*OWN_MOUNTS, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting needs root")
    script = f"mount -t tmpfs none {tmp_path} && grep -c {tmp_path} /proc/self/mountinfo && kill -KILL $$"
    killed = subprocess.run([*OWN_MOUNTS, "sh", "-c", script], capture_output=True, text=True, check=False)
    assert (killed.returncode, killed.stdout) == (-signal.SIGKILL, "1\n")
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    # Mounts that an earlier version left are removed before the next build.
    inner = tmp_path / "inner"
    subprocess.run(["mount", "-t", "tmpfs", "none", str(tmp_path)], check=True)
    inner.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(inner)], check=True)
    unmount_below(tmp_path)
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
