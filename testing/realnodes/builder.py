"""Build the images that the nodes load, from images/ on a base image that debootstrap creates, and cache the archives.

Called by `prepare`, and as `python -m testing.realnodes.builder NAME` by `make image-NAME` if no other builder is
installed: it builds images/NAME.Dockerfile, checks the image and prints its size.

After a code change, the dependencies stage is not rebuilt, and the nodes do not unpack its layers again.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

from testing.controlplane.build import BuildError, PrintLine, cache_folder, lock, progress
from testing.realnodes import archive, layers
from testing.realnodes.runtime import MissingError, check_tools

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
BASE = "localhost/finetune-base:bookworm"
BASE_PYTHON = (3, 11)
OPERATOR, PAUSE = "localhost/operator:test", "localhost/pause:test"
LIGHT, FULL = "localhost/trainer:test", "localhost/trainer-cpu:test"
"""LIGHT contains the trainer without torch, which pods mount from a volume. FULL is images/trainer-cpu.Dockerfile."""
INCLUDED = "python3,python3-venv,python-is-python3,ca-certificates"
SOURCES = ("operator", "trainer", "images", "requirements", "pyproject.toml", "testing/realnodes/images")
TOOLS = ("buildah", "debootstrap", "apt-get", "gcc", "unshare", "umount")
OWN_MOUNTS = ("unshare", "--mount", "--propagation", "private")
"""buildah mounts the layers of an image. In a namespace of its own, these mounts end with it, also if it is killed."""


class Builder:
    """buildah with its own storage in the cache."""

    def __init__(self, print_line: PrintLine) -> None:
        self._print_line = print_line
        self.folder = cache_folder().parent / "realnodes"
        self.folder.mkdir(parents=True, exist_ok=True)

    def ensure(self, trainer: str = LIGHT) -> Path:
        """Build the images that changed; return the folder of the archives."""
        kind = "whole" if trainer == FULL else "light"
        target = self.folder / f"images-{kind}-{self._key()}"
        with self.locked():
            if not target.exists():
                partial = self.folder / "images.partial"
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                older = sorted(self.folder.glob(f"images-{kind}-*"), key=lambda folder: folder.stat().st_mtime)
                for folder in older[-1:]:
                    layers.start_from(folder, partial)
                self._fill(partial, trainer)
                # Another process may be starting nodes from the newest folder.
                for folder in older[:-1]:
                    shutil.rmtree(folder)
                partial.rename(target)
        return target

    def locked(self) -> AbstractContextManager[None]:
        """Lock out other builds."""
        return lock(self.folder / "lock", "build of the images", self._print_line)

    def build(self, file: Path, name: str, *arguments: str) -> None:
        """Build one image. Keep the dependencies stage and remove the other build stages."""
        self._ensure_base()
        authorities = "/etc/ssl/certs"
        given = ["--volume", f"{authorities}:{authorities}:ro", "--build-arg", f"PYTHON_IMAGE={BASE}", *arguments]
        command = ("build", "--layers", *given, "--file", str(file))
        kept = f"localhost/{file.stem}-dependencies:kept"
        with progress(self._print_line, f"{name} from {file.relative_to(ROOT)}", 10):
            # Mounts and containers that an interrupted build left.
            unmount_below(self.folder / "storage")
            self._buildah("rm", "--all")
            self._buildah(*command, "--target", "dependencies", "--tag", kept, str(ROOT))
            self._buildah(*command, "--tag", name, str(ROOT))
            self._buildah("rmi", "--prune")

    def write(self, name: str, target: Path) -> None:
        """Write an image as an archive that `archive` can check."""
        self._buildah("push", name, f"docker-archive:{target}:{name}")

    def _fill(self, folder: Path, trainer: str) -> None:
        files = {OPERATOR: ROOT / "images/operator.Dockerfile", LIGHT: HERE / "images/trainer.Dockerfile"}
        files[FULL] = ROOT / "images/trainer-cpu.Dockerfile"
        for name in (OPERATOR, trainer):
            self.build(files[name], name)
        self._build_pause()
        self.write(OPERATOR, folder / "operator.tar")
        for name in (OPERATOR, trainer, PAUSE):
            layout = layers.layout_for(folder, name)
            self._buildah("push", "--disable-compression", name, f"oci:{layout}:{name}")

    def _ensure_base(self) -> None:
        if BASE.split(":", maxsplit=1)[0] in self._buildah("images", "--format", "{{.Name}}").split():
            return
        self._print_line("building the base with debootstrap (a minute)")
        root = self.folder / "base"
        shutil.rmtree(root, ignore_errors=True)
        try:
            mirror = _run("apt-get", "indextargets", "--format", "$(SITE)").splitlines()[0]
            _run("debootstrap", "--variant=minbase", f"--include={INCLUDED}", "bookworm", str(root), mirror)
        except (BuildError, IndexError) as error:
            raise MissingError(f"cannot build the base of the images, which needs a Debian mirror: {error}") from None
        for unused in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale"):
            shutil.rmtree(root / unused, ignore_errors=True)
        container = self._buildah("from", "scratch").strip()
        self._buildah("copy", container, str(root), "/")
        self._buildah("config", "--env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", container)
        self._buildah("commit", "--rm", container, BASE)
        shutil.rmtree(root)

    def _build_pause(self) -> None:
        self._print_line(f"building {PAUSE}")
        program = self.folder / "pause"
        _run("gcc", "-Os", "-static", "-s", "-o", str(program), str(HERE / "images/pause.c"))
        container = self._buildah("from", "scratch").strip()
        self._buildah("copy", container, str(program), "/pause")
        self._buildah("config", "--entrypoint", '["/pause"]', container)
        self._buildah("commit", "--rm", container, PAUSE)

    def _buildah(self, *arguments: str) -> str:
        storage = ("--root", str(self.folder / "storage"), "--runroot", str(self.folder / "storage-run"))
        return _run(*OWN_MOUNTS, "buildah", *storage, *arguments)

    @staticmethod
    def _key() -> str:
        digest = hashlib.sha256()
        for source in SOURCES:
            path = ROOT / source
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            for file in files:
                if file.is_file() and "__pycache__" not in file.parts:
                    digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
        return digest.hexdigest()[:16]


def unmount_below(folder: Path) -> None:
    """Unmount everything below a folder, the innermost first."""
    points = [line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for point in sorted((point for point in points if Path(point).is_relative_to(folder)), reverse=True):
        _run("umount", "--lazy", point)


def _run(*command: str) -> str:
    environment = {**os.environ, "BUILDAH_ISOLATION": "chroot"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise BuildError(f"{' '.join(command)} failed:\n{result.stdout[-2000:]}{result.stderr[-4000:]}")
    return result.stdout


def main() -> int:
    """Build one image and check it; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m testing.realnodes.builder", description=__doc__)
    parser.add_argument("name", choices=sorted(file.stem for file in (ROOT / "images").glob("*.Dockerfile")))
    parser.add_argument("--tag", required=True, help="name and tag of the image")
    parser.add_argument("--build-arg", action="append", default=[], help="NAME=VALUE for the Dockerfile")
    options = parser.parse_args()
    builder = Builder(functools.partial(print, flush=True))
    target = builder.folder / f"{options.name}.tar"
    try:
        check_tools(TOOLS)
        given = [part for value in options.build_arg for part in ("--build-arg", value)]
        with builder.locked():
            builder.build(ROOT / f"images/{options.name}.Dockerfile", options.tag, *given)
            builder.write(options.tag, target)
        defects = list(archive.find_defects(target, options.name))
        print(f"{options.tag}: {archive.size_mib(target):.0f} MiB unpacked; {'; '.join(defects) or 'correct'}")
    except (MissingError, BuildError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        target.unlink(missing_ok=True)
    return 1 if defects else 0


if __name__ == "__main__":
    sys.exit(main())
