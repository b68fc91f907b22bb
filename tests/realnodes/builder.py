"""The images that the nodes load, built from images/ on a base made by debootstrap; the archives are cached."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from tests.controlplane.build import Say, cache_folder
from tests.realnodes.runtime import MissingError

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
BASE = "localhost/finetune-base:bookworm"
OPERATOR, TRAINER, PAUSE = "localhost/operator:test", "localhost/trainer:test", "localhost/pause:test"
INCLUDED = "python3,python3-venv,python-is-python3,ca-certificates"
SOURCES = ("operator", "trainer", "images", "requirements/operator.txt", "pyproject.toml", "tests/realnodes/images")


class Builder:
    """buildah with a storage of its own in the cache."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self.folder = cache_folder().parent / "realnodes"
        self.folder.mkdir(parents=True, exist_ok=True)

    def ensure(self) -> Path:
        """Build what has changed; returns the folder of the archives."""
        key = self._key()
        target = self.folder / f"images-{key}"
        if not target.exists():
            partial = self.folder / "images.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            self._ensure_base()
            self.build(ROOT / "images/operator.Dockerfile", OPERATOR, ROOT, partial / "operator.tar")
            self.build(HERE / "images/trainer.Dockerfile", TRAINER, ROOT, partial / "trainer.tar")
            self._build_pause(partial / "pause.tar")
            for old in self.folder.glob("images-*"):
                shutil.rmtree(old)
            partial.rename(target)
        return target

    def build(self, file: Path, name: str, context: Path, archive: Path) -> None:
        """Build one image and write it as an archive that containerd takes."""
        self._say(f"building {name} from {file.relative_to(ROOT)}")
        authorities = "/etc/ssl/certs"
        arguments = ["--volume", f"{authorities}:{authorities}:ro", "--build-arg", f"PYTHON_IMAGE={BASE}"]
        self._buildah("build", "--layers", *arguments, "--file", str(file), "--tag", name, str(context))
        self._buildah("push", name, f"docker-archive:{archive}:{name}")

    def size_bytes(self, name: str) -> int:
        """Size of an image, unpacked."""
        return int(self._buildah("inspect", "--format", "{{.Docker.Size}}", "--type", "image", name) or 0)

    def _ensure_base(self) -> None:
        if BASE.split("/")[1].split(":", maxsplit=1)[0] in self._buildah("images", "--format", "{{.Name}}"):
            return
        self._say("making the base with debootstrap (a minute)")
        root = self.folder / "base"
        shutil.rmtree(root, ignore_errors=True)
        mirror = _run("apt-get", "indextargets", "--format", "$(SITE)").splitlines()[0]
        _run("debootstrap", "--variant=minbase", f"--include={INCLUDED}", "bookworm", str(root), mirror)
        for waste in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale"):
            shutil.rmtree(root / waste, ignore_errors=True)
        container = self._buildah("from", "scratch").strip()
        self._buildah("copy", container, str(root), "/")
        self._buildah("config", "--env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", container)
        self._buildah("commit", "--rm", container, BASE)
        shutil.rmtree(root)

    def _build_pause(self, archive: Path) -> None:
        self._say(f"building {PAUSE}")
        program = self.folder / "pause"
        _run("gcc", "-Os", "-static", "-s", "-o", str(program), str(HERE / "images/pause.c"))
        container = self._buildah("from", "scratch").strip()
        self._buildah("copy", container, str(program), "/pause")
        self._buildah("config", "--entrypoint", '["/pause"]', container)
        self._buildah("commit", "--rm", container, PAUSE)
        self._buildah("push", PAUSE, f"docker-archive:{archive}:{PAUSE}")

    def _buildah(self, *arguments: str) -> str:
        storage = ("--root", str(self.folder / "storage"), "--runroot", str(self.folder / "storage-run"))
        return _run("buildah", *storage, *arguments)

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


def _run(*command: str) -> str:
    environment = {**os.environ, "BUILDAH_ISOLATION": "chroot"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise MissingError(f"{' '.join(command)} failed:\n{result.stdout[-2000:]}{result.stderr[-4000:]}")
    return result.stdout
