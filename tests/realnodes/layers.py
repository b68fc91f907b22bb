"""The images, unpacked once: a containerd folder that each node begins with.

Layers are never written to once they are unpacked, so nodes share their files by hard links. Six gigabytes of a trainer
are then unpacked once and not by every node.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.controlplane.build import Say, lock
from tests.controlplane.process import Guard, Program, wait_for
from tests.realnodes.runtime import MissingError, Runtime

CONFIG = """\
version = 2
root = "{root}"
state = "{work}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "{socket}"
"""
START_SECONDS = 30.0


def ensure_layers(images: Path, runtime: Runtime, say: Say) -> Path:
    """Folder of a containerd that has unpacked all archives in `images`."""
    layers = images / "layers"
    with lock(images / "lock", "unpacking of the images", say):
        if not layers.exists():
            say("unpacking the images")
            partial, work = images / "layers.partial", images / "work"
            for folder in (partial, work):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
            _unpack(sorted(images.glob("*.tar")), partial, work, runtime)
            shutil.rmtree(work)
            partial.rename(layers)
            # Gigabytes that nobody reads any more.
            for archive in images.glob("trainer*.tar"):
                archive.unlink()
    return layers


def copy_layers(layers: Path, target: Path) -> None:
    """A containerd folder for one node."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _run("cp", "--archive", "--link", str(layers), str(target))
    # Its databases are written in place.
    for database in target.rglob("*.db"):
        aside = database.with_suffix(".aside")
        shutil.copyfile(database, aside)
        aside.replace(database)


def _unpack(archives: list[Path], root: Path, work: Path, runtime: Runtime) -> None:
    # The path of a socket may have 107 characters.
    socket = Path("/run") / f"finetune-{root.parent.name}.sock"
    configuration = work / "containerd.toml"
    configuration.write_text(CONFIG.format(root=root, work=work, socket=socket))
    guard = Guard()
    try:
        command = ["unshare", "--mount", "--propagation", "private", str(runtime.containerd)]
        Program("containerd", [*command, "--config", str(configuration)], work / "containerd.log", guard).start()
        ctr = [str(runtime.ctr), "--address", str(socket), "--namespace", "k8s.io"]
        wait_for("containerd serves", lambda: _succeeds(*ctr, "version"), START_SECONDS)
        for archive in archives:
            _run(*ctr, "images", "import", str(archive))
    finally:
        guard.close()
        for file in socket.parent.glob(f"{socket.name}*"):
            file.unlink()


def _succeeds(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise MissingError(f"{' '.join(command)} failed: {result.stderr}")
