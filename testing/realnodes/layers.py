"""Unpack the images once, into a containerd folder that each node starts with.

Unpacked layers are never written to, so nodes share their files by hard links. The six gigabytes of a trainer image are
unpacked once and not by every node. The project's own code is a separate layer: a new folder starts with the contents
of the previous one and unpacks only the layers that are missing.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

from testing.controlplane.build import PrintLine, lock
from testing.controlplane.process import Guard, Program, wait_for
from testing.realnodes.runtime import MissingError, Runtime

CONFIG = """\
version = 2
root = "{root}"
state = "{work}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "{socket}"
"""
START_SECONDS = 30.0
LAYERS, PREVIOUS = "layers", "layers.former"
CONTENT = "io.containerd.content.v1.content/blobs/sha256"
BLOBS = "blobs/sha256"
INDEX = "index.json"
NAME = "io.containerd.image.name"


def start_from(previous: Path, images: Path) -> None:
    """Copy the layers that the folder `previous` has unpacked to the folder `images`."""
    if (previous / LAYERS).exists():
        copy_layers(previous / LAYERS, images / PREVIOUS)


def layout_for(images: Path, name: str) -> Path:
    """Create the folder for an OCI layout of this image and return it.

    It contains all unpacked blobs, so that none is written again.
    """
    layout = images / f"{name.rpartition('/')[2].partition(':')[0]}.oci"
    (layout / BLOBS).mkdir(parents=True)
    for blob in _blobs(images / PREVIOUS / CONTENT):
        (layout / BLOBS / blob.name).hardlink_to(blob)
    return layout


def ensure_layers(images: Path, runtime: Runtime, print_line: PrintLine) -> Path:
    """Return a containerd folder with all layouts in `images` unpacked."""
    layers = images / LAYERS
    with lock(images / "lock", "unpacking of the images", print_line):
        if not layers.exists():
            print_line("unpacking the images")
            partial, work = images / "layers.partial", images / "work"
            for folder in (partial, work):
                shutil.rmtree(folder, ignore_errors=True)
            work.mkdir()
            if (images / PREVIOUS).exists():
                copy_layers(images / PREVIOUS, partial)
            else:
                partial.mkdir()
            layouts = sorted(images.glob("*.oci"))
            _unpack(layouts, partial, work, runtime)
            partial.rename(layers)
            for folder in (work, images / PREVIOUS, *layouts):
                shutil.rmtree(folder, ignore_errors=True)
    return layers


def copy_layers(layers: Path, target: Path) -> None:
    """Create the containerd folder of one node."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _run("cp", "--archive", "--link", str(layers), str(target))
    # Copy the databases, because containerd writes them in place.
    for database in target.rglob("*.db"):
        temporary = database.with_suffix(".copy")
        shutil.copyfile(database, temporary)
        temporary.replace(database)


def _unpack(layouts: list[Path], root: Path, work: Path, runtime: Runtime) -> None:
    # The path of a socket has at most 107 characters.
    socket = Path("/run") / f"finetune-{root.parent.name}.sock"
    configuration = work / "containerd.toml"
    configuration.write_text(CONFIG.format(root=root, work=work, socket=socket))
    guard = Guard()
    try:
        command = ["unshare", "--mount", "--propagation", "private", str(runtime.containerd)]
        Program("containerd", [*command, "--config", str(configuration)], work / "containerd.log", guard).start()
        ctr = [str(runtime.ctr), "--address", str(socket), "--namespace", "k8s.io"]
        wait_for("containerd accepts requests", lambda: _succeeds(*ctr, "version"), START_SECONDS)
        for layout in layouts:
            _import(layout, root, work / "import.log", ctr)
        # Removing an image makes containerd drop the blobs that no image uses.
        named = _name(layouts[0])
        _run(*ctr, "images", "tag", named, f"{named}-unused")
        _run(*ctr, "images", "rm", "--sync", f"{named}-unused")
    finally:
        guard.close()
        for file in socket.parent.glob(f"{socket.name}*"):
            file.unlink()


def _import(layout: Path, root: Path, log: Path, ctr: list[str]) -> None:
    command = [*ctr, "images", "import", "-"]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output)
        with process, contextlib.suppress(BrokenPipeError):
            assert process.stdin is not None
            with tarfile.open(fileobj=process.stdin, mode="w|") as packed:
                pack(layout, root / CONTENT, packed)
    if process.returncode != 0:
        raise MissingError(f"{' '.join(command)} failed: {log.read_text()}")


def pack(layout: Path, present: Path, packed: tarfile.TarFile) -> None:
    """Write a layout as an archive for containerd, without the blobs that are in the folder `present`."""
    unpacked = {blob.name for blob in _blobs(present)}
    packed.add(layout / "oci-layout", "oci-layout")
    index = json.loads((layout / INDEX).read_text())
    index["manifests"][0]["annotations"][NAME] = _name(layout)
    written = json.dumps(index).encode()
    entry = tarfile.TarInfo(INDEX)
    entry.size = len(written)
    packed.addfile(entry, io.BytesIO(written))
    for blob in _blobs(layout / BLOBS):
        if blob.name not in unpacked:
            packed.add(blob, f"{BLOBS}/{blob.name}")


def _name(layout: Path) -> str:
    (manifest,) = json.loads((layout / INDEX).read_text())["manifests"]
    name: str = manifest["annotations"]["org.opencontainers.image.ref.name"]
    return name


def _blobs(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


def _succeeds(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise MissingError(f"{' '.join(command)} failed: {result.stderr}")
