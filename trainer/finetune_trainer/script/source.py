"""Facts about a script that its text shows. Pure: nothing is executed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_SAVED_NAME = re.compile(r"(checkpoint-|checkpoint_|step_)$")
CHECKPOINT_PREFIX = "checkpoint-"


@dataclass(frozen=True)
class ScriptFacts:
    """What the text of a script shows.

    Attributes:
        uses_accelerate: whether it imports accelerate.
        flags: flags that it declares, without dashes, and their defaults; a default that is not a literal is None.
        saves_on_all_ranks: whether every rank calls `save_state`; otherwise only the main process does.
        save_guard: condition under which it calls `save_state`; it may name kinds of distribution.
        skips_by_step: whether it reads and skips the batches before `resume_step` itself.
        checkpoint_prefix: start of the names of its checkpoints.
    """

    uses_accelerate: bool = True
    flags: Mapping[str, Any] = field(default_factory=dict)
    saves_on_all_ranks: bool = False
    save_guard: str = ""
    skips_by_step: bool = False
    checkpoint_prefix: str = CHECKPOINT_PREFIX


def read_facts(text: str) -> ScriptFacts:
    """Return the facts of a script. One that cannot be parsed has the default facts: Python reports its error."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return ScriptFacts()
    guards = _save_guards(tree)
    return ScriptFacts(
        uses_accelerate=any(_imports(node, "accelerate") for node in ast.walk(tree)),
        flags=dict(_flags(tree)),
        saves_on_all_ranks=bool(guards) and not all(guards),
        save_guard=" ".join(guards),
        skips_by_step=any(_skips_by_step(node) for node in ast.walk(tree)),
        checkpoint_prefix=next(_prefixes(tree), CHECKPOINT_PREFIX),
    )


def _imports(node: ast.AST, package: str) -> bool:
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [node.module or ""]
    return any(name.partition(".")[0] == package for name in names)


def _flags(tree: ast.AST) -> Iterator[tuple[str, Any]]:
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr != "add_argument":
            continue
        names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        default = next((word.value for word in node.keywords if word.arg == "default"), None)
        value = default.value if isinstance(default, ast.Constant) else None
        yield from ((name.lstrip("-").replace("-", "_"), value) for name in names if name.startswith("--"))


def _save_guards(tree: ast.AST) -> list[str]:
    """Return, for each call of save_state, the conditions on the main process around it; '' if there is none."""

    def visit(node: ast.AST, around: str) -> Iterator[str]:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "save_state":
            yield around
        for name, value in ast.iter_fields(node):
            test = ast.unparse(node.test) if isinstance(node, ast.If) and name == "body" else ""
            inside = f"{around} {test}".strip() if "main_process" in test else around
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from visit(child, inside)

    return list(visit(tree, ""))


def _skips_by_step(node: ast.AST) -> bool:
    if not isinstance(node, ast.If) or "resume_step" not in ast.unparse(node.test):
        return False
    return any(isinstance(each, ast.Continue) for each in ast.walk(node))


def _prefixes(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            for part, following in zip(node.values, node.values[1:], strict=False):
                if not (isinstance(part, ast.Constant) and isinstance(following, ast.FormattedValue)):
                    continue
                if match := _SAVED_NAME.search(str(part.value)):
                    yield match[1]
