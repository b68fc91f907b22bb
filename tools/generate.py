"""Write the generated files: the CRD, the reference, the chart's flags, and the version wherever it is repeated.

`make generate` writes them. `make verify` runs this with --check, which only prints the differences.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from finetune_contract import __version__
from finetune_operator.api import crd, flags, reasons, reference
from finetune_operator.server.options import value_schemas

ROOT = Path(__file__).resolve().parents[1]
TROUBLESHOOTING = "docs/troubleshooting.md"
VALUES_SCHEMA = "charts/finetune-operator/values.schema.json"
CHART_HELPERS = "charts/finetune-operator/templates/_helpers.tpl"
GENERATED: dict[str, Callable[[], str]] = {
    crd.FILE: crd.render,
    # Helm cannot read files outside the chart.
    "charts/finetune-operator/files/crd.yaml": crd.render,
    reference.JOB_FILE: reference.render_job,
    reference.REASONS_FILE: reference.render_reasons,
    "docs/reference/flags.md": flags.render_page,
}
"""Each generated file, relative to the repository root, and the function that renders it."""
STAMPED = {
    "charts/finetune-operator/Chart.yaml": r"^(?:version|appVersion): (\S+)$",
    "charts/finetune-operator/values.yaml": r"^ +(?:gpu|cpu|cpuIntel|export): ghcr\.io/finetune-operator/\S+:(\S+)$",
    "examples/*.yaml": r"^ +image: ghcr\.io/finetune-operator/\S+:(\S+)$",
}
"""Files (patterns) that must repeat the version as a literal, and a regular expression whose group finds it."""


def render_all(root: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and the generated text of each file."""
    for name, render in GENERATED.items():
        yield name, render()
    if text := _read(root / VALUES_SCHEMA):
        yield VALUES_SCHEMA, with_flags(text, chart_flags(_read(root / CHART_HELPERS)))
    for pattern, version in STAMPED.items():
        for path in sorted(root.glob(pattern)):
            yield str(path.relative_to(root)), stamp(path.read_text(encoding="utf-8"), version)


def chart_flags(helpers: str) -> set[str]:
    """Return the flags that the chart sets from its own values, as its template lists them."""
    return set(re.findall(r'"([a-z-]+)"', next(line for line in helpers.splitlines() if "$own := list" in line)))


def with_flags(schema: str, own: set[str]) -> str:
    """Return the schema of the chart's values with all flags of the operator.

    The schema accepts the flags that the chart sets itself, so that its template can name the right value.
    """
    lines = [
        f'        "{name}": {json.dumps({} if name in own else allowed)}' for name, allowed in value_schemas().items()
    ]
    block = '    "flags": {\n      "type": "object",\n      "additionalProperties": false,\n      "properties": {\n'
    block += ",\n".join(lines) + "\n      }\n    },\n"
    return re.sub(r'^    "flags": \{\n.*?^    \},\n', lambda _: block, schema, count=1, flags=re.MULTILINE | re.DOTALL)


def stamp(text: str, pattern: str) -> str:
    """Return the text with the current version in place of each match of the pattern's group."""

    def replace(match: re.Match[str]) -> str:
        start, end = (position - match.start() for position in match.span(1))
        return match[0][:start] + __version__ + match[0][end:]

    return re.sub(pattern, replace, text, flags=re.MULTILINE)


def write(root: Path) -> None:
    """Write the files that differ."""
    for name, text in render_all(root):
        path = root / name
        if _read(path) != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {name}")


def differences(root: Path) -> str:
    """Return the unified diff from the committed to the generated files; empty if they are equal."""
    lines: list[str] = []
    for name, text in render_all(root):
        committed = _read(root / name).splitlines(keepends=True)
        lines += difflib.unified_diff(committed, text.splitlines(keepends=True), name, f"{name} (generated)")
    return "".join(lines)


def undocumented_reasons(root: Path) -> list[str]:
    """Return the reasons that docs/troubleshooting.md has no section for."""
    documented = set(re.findall(r"^### (\w+)$", _read(root / TROUBLESHOOTING), re.MULTILINE))
    return [reason.value for reason in reasons.REASONS if reason.value not in documented]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def main() -> int:
    """Write or compare the files; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing; exit 1 on a difference")
    if not parser.parse_args().check:
        write(ROOT)
        return 0
    if missing := undocumented_reasons(ROOT):
        print(f"{TROUBLESHOOTING}: write a section '### <reason>' for {', '.join(missing)}", file=sys.stderr)
        return 1
    if difference := differences(ROOT):
        sys.stdout.write(difference)
        print("generated files differ: run `make generate` and commit the result", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
