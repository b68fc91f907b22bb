"""The build of the control plane's programs with a stand-in for the compiler, which takes minutes."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path

import pytest

from testing.controlplane import build

# Says a version; lists no package; writes the file that it is told to build, and its name into a list.
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


class Machine:
    """A cache folder, and a compiler that notes what it built."""

    def __init__(self, folder: Path) -> None:
        self.cache = folder / "cache"
        self.go = folder / "bin" / "go"
        self.built = folder / "built"
        self.go.parent.mkdir()
        self.breaks_at("nothing")

    def breaks_at(self, program: str) -> None:
        self.go.write_text(COMPILER.format(broken=program, built=self.built))
        self.go.chmod(0o755)

    def build(self) -> dict[str, Path]:
        return build.ensure_programs(say=lambda _: None, cache=self.cache)

    def num_built(self) -> int:
        return len(self.built.read_text().splitlines()) if self.built.exists() else 0


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)
    monkeypatch.setenv("PATH", f"{made.go.parent}:/usr/bin:/bin")
    return made


def test_programs_are_built_once(machine: Machine) -> None:
    programs = machine.build()
    assert set(programs) == set(build.versions())
    assert all(path.read_text() == "program\n" for path in programs.values())
    assert machine.build() == programs
    assert machine.num_built() == len(programs)
    assert not (machine.cache / "work").exists()


def test_build_that_breaks_says_why_and_the_next_one_goes_on(machine: Machine) -> None:
    machine.breaks_at("kube-scheduler")
    with pytest.raises(build.BuildError, match="undefined: answer"):
        machine.build()
    done = machine.num_built()
    assert 0 < done < len(build.versions())
    assert not list(machine.cache.glob("*/bin/kube-scheduler"))
    machine.breaks_at("nothing")
    programs = machine.build()
    assert all(path.exists() for path in programs.values())
    assert machine.num_built() == len(programs)


def test_callers_at_the_same_time_build_once(machine: Machine) -> None:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: machine.build(), range(4)))
    assert all(result == results[0] for result in results)
    assert machine.num_built() == len(results[0])


def test_go_that_is_too_old_is_passed_over(machine: Machine) -> None:
    machine.go.write_text("#!/bin/sh\necho go1.20.1\n")
    version, path = build._find_toolchain(machine.cache)
    assert version.startswith("go1.")
    assert path.is_relative_to(machine.cache)


def test_another_flag_or_toolchain_is_another_program() -> None:
    module = build.KUBERNETES
    changed = build.Module(module.name, module.requires, module.packages, stamped=())
    assert module.version in module.key("go1.26.0")
    assert len({module.key("go1.26.0"), module.key("go1.26.1"), changed.key("go1.26.0")}) == 3


def test_a_changed_source_is_another_program(tmp_path: Path) -> None:
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
