"""Create the root file system of the operator's image: Python, its packages, and the shared libraries that they load.

Runs in the build stage, on any base image with Python and dpkg: assemble.py APP ROOT. The result has no shell and no
package manager, so there is little to patch and little for an attacker to use.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import sbom

UNUSED_STDLIB = {"test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3", "pydoc_data", "distutils"}
UNUSED_SYNC_CLIENT = ("client", "config", "dynamic", "informer", "leaderelection", "stream", "utils", "watch")
"""The operator imports only `kubernetes.aio`; these parts of the `kubernetes` package take 33 MB."""
GENERATED = ("api", "models")
"""Folders of `kubernetes.aio.client` with a thousand generated modules. The image contains only their bytecode."""
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
USER = 65532


def main(app: Path, root: Path) -> None:
    """Fill `root` from the running Python and from the environment at `app`."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        link = Path("/") / name
        if link.is_symlink():
            (root / name).symlink_to(link.readlink())
    python = Path(sys._base_executable).resolve()  # type: ignore[attr-defined]
    copied = [*copy_python(python, root), *copy_app(app, root)]
    copied += copy_libraries([file for file in copied if is_elf(file)], root)
    write_etc(root)
    site_packages = next((root / str(app).lstrip("/")).glob("lib/python3*/site-packages"))
    documents = root / "usr/share/sbom"
    packages = [*sbom.python_packages(str(site_packages)), *sbom.debian_packages({str(file) for file in copied})]
    sbom.write(documents / "finetune-operator.spdx.json", "finetune-operator", packages)
    print(f"{sum(file.lstat().st_size for file in root.rglob('*')) >> 20} MiB in {root}")


def copy_python(python: Path, root: Path) -> list[Path]:
    """Copy the interpreter and its standard library without development files; return the ELF files."""
    library = Path(sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix, "base": sys.base_prefix}))

    def unused(folder: str, names: list[str]) -> set[str]:
        at_top = Path(folder) == library
        return {
            name
            for name in names
            if name in ("site-packages", "dist-packages")
            or name in UNUSED_STDLIB
            or (at_top and name.startswith("config-"))
            or name.endswith((".a", ".opt-1.pyc", ".opt-2.pyc"))
        }

    shutil.copytree(library, under(root, library), symlinks=True, ignore=unused)
    # Debian's Python contains no bytecode in an image, and the root file system of a pod is read-only.
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(under(root, library))], check=False)
    copy(python, root)
    for name in ("python3", "python"):
        link = under(root, python.with_name(name))
        if not link.exists():
            link.symlink_to(python.name)
    return [python, *(file for file in library.rglob("*.so"))]


def copy_app(app: Path, root: Path) -> list[Path]:
    """Copy the virtual environment without unused files; return its shared libraries."""
    target = under(root, app)
    shutil.copytree(app, target, symlinks=True)
    for folder in target.rglob("tests"):
        shutil.rmtree(folder, ignore_errors=True)
    package = next(target.glob("lib/python3*/site-packages/kubernetes"))
    for name in UNUSED_SYNC_CLIENT:
        shutil.rmtree(package / name, ignore_errors=True)
    init = package / "__init__.py"
    # The original __init__.py imports the removed modules.
    init.write_text("\n".join(line for line in init.read_text().splitlines() if line.startswith("__")) + "\n")
    shutil.rmtree(package / "__pycache__", ignore_errors=True)
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(package / "__init__.py")], check=True)
    for name in GENERATED:
        keep_only_bytecode(package / "aio/client" / name)
    shutil.rmtree(target / "include", ignore_errors=True)
    for name in (".lock", ".gitignore", "CACHEDIR.TAG"):
        (target / name).unlink(missing_ok=True)
    return list(app.rglob("*.so*"))


def keep_only_bytecode(folder: Path) -> None:
    """Replace the source of each module by its bytecode, which halves the size."""
    subprocess.run([sys.executable, "-m", "compileall", "-q", "-b", str(folder)], check=True)
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    for source in folder.glob("*.py"):
        source.unlink()


def copy_libraries(programs: Iterable[Path], root: Path) -> list[Path]:
    """Copy every shared library that one of the programs loads, including the dynamic loader; return them."""
    found = {library for program in programs for library in libraries(program)}
    for library in found:
        copy(library, root)
    return sorted(found)


def libraries(program: Path) -> Iterator[Path]:
    """Yield the shared libraries that `ldd` reports for a program."""
    listed = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False).stdout
    for line in listed.splitlines():
        fields = line.replace("=>", " ").split()
        path = next((field for field in fields if field.startswith("/")), None)
        # Libraries that a wheel contains are copied with the environment.
        if path is not None and "/site-packages/" not in path:
            yield Path(path)


def write_etc(root: Path) -> None:
    """Write users, name lookup and certificate authorities; create /tmp."""
    etc = root / "etc"
    etc.mkdir(exist_ok=True)
    (etc / "passwd").write_text(
        f"root:x:0:0:root:/:/sbin/nologin\noperator:x:{USER}:{USER}:operator:/tmp:/sbin/nologin\n"
    )
    (etc / "group").write_text(f"root:x:0:\noperator:x:{USER}:\n")
    (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files dns\n")
    if Path(CERTIFICATES).exists():
        copy(Path(CERTIFICATES), root)
    temporary = root / "tmp"
    temporary.mkdir()
    temporary.chmod(0o1777)


def copy(file: Path, root: Path) -> None:
    """Copy a file to the same path below the root; follow links."""
    target = under(root, file)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, target)
    target.chmod(file.stat().st_mode & 0o777)


def under(root: Path, path: Path) -> Path:
    """Return the path below the new root for an absolute path, resolved through the links of the new root."""
    parent = (root / str(path.parent).lstrip("/")).resolve()
    if not parent.is_relative_to(root):
        parent = root / str(parent).lstrip("/")
    return parent / path.name


def is_elf(file: Path) -> bool:
    """Return whether the file is a program or a shared library."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(4) == b"\x7fELF"


if __name__ == "__main__":
    os.umask(0o022)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
