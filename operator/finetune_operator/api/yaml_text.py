"""Reads YAML as kubectl does and writes it in a readable form.

PyYAML alone reads 1e-4 as a string, 1:30 as ninety and dates as objects without a JSON form, and it accepts duplicate
keys.
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
    """Reads numbers in JSON's forms and dates as strings; refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse duplicate keys, as kubectl does; PyYAML would silently keep the last value."""
        seen: set[object] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in seen and name != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {name!r}; leave one of them out", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Writes keys in the given order, without anchors, and indents lists below their key."""

    def ignore_aliases(self, data: object) -> bool:
        """Write equal parts in full instead of as references."""
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
    """Read the documents of a text; empty ones are skipped.

    Raises:
        yaml.YAMLError: the text is not YAML, or has a duplicate key.
    """
    return (document for document in yaml.load_all(text, Loader) if document is not None)


def load(text: str) -> Any:
    """Read one document, or one value.

    Raises:
        yaml.YAMLError: as `load_all`.
    """
    return yaml.load(text, Loader)  # noqa: S506  a SafeLoader


def dump(document: object) -> str:
    """Write a document so that `load` and kubectl read the same values."""
    return yaml.dump(document, Dumper=Dumper, sort_keys=False, width=120, allow_unicode=True)
