"""Builds of the control plane programs, with a stub instead of the compiler, which takes minutes."""

from __future__ import annotations

import concurrent.futures
import re
from pathlib import Path

import pytest

from testing.controlplane import build

# Prints a version, lists no package, creates the file that it should build, and appends its name to a list.
COMPILER = """#!/bin/sh
case "$1" in
env) echo go1.99.0 ;;
build)
  while [ "$1" != -o ]; do shift; done
  case "$2" in *{broken}) echo "undefined: answer"; exit 1 ;; esac
  echo "$2" >> {built}
  echo program > "$2" ;;
esac
"""


class BuildHarness:
    """A cache folder, and a stub compiler that records what it has built."""

    def __init__(self, folder: Path) -> None:
        self.cache = folder / "cache"
        self.go = folder / "bin" / "go"
        self.built = folder / "built"
        self.go.parent.mkdir()
        self.fail_at("nothing")

    def fail_at(self, program: str) -> None:
        self.go.write_text(COMPILER.format(broken=program, built=self.built))
        self.go.chmod(0o755)

    def build(self) -> dict[str, Path]:
        return build.ensure_programs(print_line=lambda _: None, cache=self.cache)

    def num_built(self) -> int:
        return len(self.built.read_text().splitlines()) if self.built.exists() else 0


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuildHarness:
    created = BuildHarness(tmp_path)
    monkeypatch.setenv("PATH", f"{created.go.parent}:/usr/bin:/bin")
    return created


def test_programs_are_built_once(harness: BuildHarness) -> None:
    programs = harness.build()
    assert set(programs) == set(build.versions())
    assert all(path.read_text() == "program\n" for path in programs.values())
    assert harness.build() == programs
    assert harness.num_built() == len(programs)
    assert not (harness.cache / "work").exists()


def test_failed_build_reports_the_error_and_the_next_build_continues(harness: BuildHarness) -> None:
    harness.fail_at("kube-scheduler")
    with pytest.raises(build.BuildError, match="undefined: answer"):
        harness.build()
    done = harness.num_built()
    assert 0 < done < len(build.versions())
    assert not list(harness.cache.glob("*/bin/kube-scheduler"))
    harness.fail_at("nothing")
    programs = harness.build()
    assert all(path.exists() for path in programs.values())
    assert harness.num_built() == len(programs)


def test_concurrent_callers_build_once(harness: BuildHarness) -> None:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: harness.build(), range(4)))
    assert all(result == results[0] for result in results)
    assert harness.num_built() == len(results[0])


def test_go_that_is_too_old_is_not_used(harness: BuildHarness) -> None:
    harness.go.write_text("#!/bin/sh\necho go1.20.1\n")
    version, path = build._find_toolchain(harness.cache)
    assert version.startswith("go1.")
    assert version != "go1.20.1"
    assert path.is_relative_to(harness.cache)


def test_other_flags_or_another_toolchain_change_the_cache_key() -> None:
    module = build.KUBERNETES
    changed = build.Module(module.name, module.requires, module.packages, stamped=())
    assert module.version in module.key("go1.26.0")
    assert len({module.key("go1.26.0"), module.key("go1.26.1"), changed.key("go1.26.0")}) == 3


def test_changed_source_changes_the_cache_key(tmp_path: Path) -> None:
    folder = tmp_path / "server"
    folder.mkdir()
    (folder / "go.mod").write_text("module server\n\nrequire example.org/library v1.2.3\n")
    (folder / "go.sum").write_text("")
    module = build.Module("server", "example.org/library", {"server": "."}, root=tmp_path)
    keys = {module.key("go1.99.0")}
    for text in ("package main\n", "package main // changed\n"):
        (folder / "main.go").write_text(text)
        keys.add(module.key("go1.99.0"))
    assert len(keys) == 3


@pytest.mark.parametrize(
    "module",
    [*build.ALL_MODULES, build.HELM, build.S3_SERVER, build.GCS_STAND_IN, build.KUEUE],
    ids=lambda module: module.name,
)
def test_every_module_has_a_version(module: build.Module) -> None:
    """`go mod tidy` writes the required modules in one line each, or in a block."""
    assert re.fullmatch(r"v\d+\.\d+\.\d+", module.version)
