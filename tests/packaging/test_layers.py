"""The structure of the repository: which part may import which, the size of packages and files, unique class names."""

from __future__ import annotations

import ast
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN_IMPORTS = {
    "bench": {"tests"},
    "tests": {"bench"},
    "testing": {"tests", "bench"},
    "operator": {"testing", "tests", "bench"},
    "trainer": {"testing", "tests", "bench"},
}
"""Top-level folder -> packages that its modules must not import. Code that two of them need belongs in testing/."""
MAX_MODULES = 20
"""Maximum number of modules per package in operator/ and trainer/, without __init__.py and __main__.py."""
MAX_LINES = 450
REPEATED_CLASSES = {
    "Method": "the enum of names in the contract, and the base class of the implementations in the trainer",
}
"""Public class names that may be defined more than once, with the reason."""


@cache
def python_files(*folders: str) -> tuple[Path, ...]:
    """Return the Python files below the folders that git tracks or would add, relative to the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    files = tuple(Path(name) for name in sorted(set(listed)) if name.endswith(".py") and (ROOT / name).is_file())
    assert files, f"git lists no Python files in {folders}"
    return files


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=str(path))


def imported_packages(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and top-level package of every absolute import, including those inside functions."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module.partition(".")[0]


@pytest.mark.parametrize("folder", FORBIDDEN_IMPORTS)
def test_a_folder_imports_only_the_allowed_packages(folder: str) -> None:
    wrong = [
        f"{path}:{line} imports {package}; move the shared code to testing/"
        for path in python_files(folder)
        for line, package in imported_packages(path)
        if package in FORBIDDEN_IMPORTS[folder]
    ]
    assert wrong == []


def test_relative_imports_are_not_used() -> None:
    """The check above reads absolute imports only."""
    wrong = [
        f"{path}:{node.lineno}"
        for path in python_files(*FORBIDDEN_IMPORTS)
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ImportFrom) and node.level > 0
    ]
    assert wrong == []


def test_a_package_has_few_modules() -> None:
    modules: dict[Path, int] = defaultdict(int)
    for path in python_files("operator", "trainer"):
        modules[path.parent] += path.stem not in ("__init__", "__main__")
    wrong = {str(folder): number for folder, number in modules.items() if number > MAX_MODULES}
    assert wrong == {}, f"split these packages: at most {MAX_MODULES} modules each"


def test_a_file_has_few_lines() -> None:
    lengths = {str(path): len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in python_files(".")}
    wrong = {path: length for path, length in lengths.items() if length > MAX_LINES}
    assert wrong == {}, f"split these files: at most {MAX_LINES} lines each"


def test_a_public_class_name_is_defined_once() -> None:
    definitions: dict[str, list[str]] = defaultdict(list)
    for path in python_files("operator", "trainer"):
        for node in parse(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                definitions[node.name].append(f"{path}:{node.lineno}")
    repeated = {name: found for name, found in definitions.items() if len(found) > 1}
    wrong = {name: found for name, found in repeated.items() if name not in REPEATED_CLASSES}
    assert wrong == {}, "rename all but one of each"
    assert set(REPEATED_CLASSES) <= set(repeated), "remove names from REPEATED_CLASSES that are now unique"
