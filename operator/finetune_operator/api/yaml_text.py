"""YAML as kubectl reads it, and as people like to read it.

PyYAML alone would read 1e-4 as a text, 1:30 as ninety, a date as no JSON at all, and a key that stands twice as once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

_INT = re.compile(r"^[-+]?(0|[1-9][0-9_]*|0o?[0-7_]+|0x[0-9a-fA-F_]+)$")
_FLOAT = re.compile(r"^[-+]?([0-9][0-9_]*\.[0-9]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|nan)$")
_REPLACED = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")


class Loader(yaml.SafeLoader):
    """Reads numbers as JSON has them, dates as text, and refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse what kubectl refuses, too, before the last of two values would silently win."""
        seen: set[object] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in seen and name != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"key {name!r} stands there twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Writes in the given order, without anchors, lists indented below their key."""

    def ignore_aliases(self, data: object) -> bool:
        """Write equal parts out instead of pointing from one to the other."""
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Indent a list below its key."""
        super().increase_indent(flow, False)


def _use_json_numbers(kind: type[Loader] | type[Dumper]) -> None:
    kept = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
        for first, resolvers in kind.yaml_implicit_resolvers.items()
    }
    kind.yaml_implicit_resolvers = kept
    kind.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
    kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


_use_json_numbers(Loader)
_use_json_numbers(Dumper)


def load_all(text: str) -> Iterator[Any]:
    """Read the documents of a text; empty ones are left out.

    Raises:
        yaml.YAMLError: it is not YAML, or a key stands twice.
    """
    return (document for document in yaml.load_all(text, Loader) if document is not None)


def load(text: str) -> Any:
    """Read one document, or one value.

    Raises:
        yaml.YAMLError: as `load_all`.
    """
    return yaml.load(text, Loader)  # noqa: S506  a SafeLoader


def dump(document: object) -> str:
    """Write a document so that `load` and kubectl read the same back."""
    return yaml.dump(document, Dumper=Dumper, sort_keys=False, width=120, allow_unicode=True)
