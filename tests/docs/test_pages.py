"""The documentation is complete and correct: links, paths, make targets, reasons, methods, decisions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_operator.api.conditions import CONDITIONS
from finetune_operator.api.reasons import REASONS, CountsAs, Reason
from finetune_operator.api.rules.edits import FIXED

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ADRS = sorted(DOCS.glob("adr/[0-9]*.md"))
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), ROOT / "examples/base-circles/README.md"])
FOLDERS = (
    "",
    "operator/finetune_operator",
    "operator/finetune_operator/cluster",
    "trainer",
    "trainer/finetune_trainer",
    "docs",
)
"""Base folders for the paths in the documentation."""
PREFIXES = (
    "operator|trainer|tests|testing|bench|tools|docs|examples|images|crds|charts|plan|cluster|api|cli|server|manifests"
    "|coordinator|methods|models|data|checkpoint|distributed|supervisor|train|finetune_trainer|finetune_contract"
)
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")
MAKE = re.compile(r"`make ([a-z-]+[a-z])[`\s]")
PATH = re.compile(rf"`((?:{PREFIXES})/[\w./-]+\.(?:py|yaml|md|toml|sh))`")


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_paths_and_targets_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in LINK.findall(text):
        assert (page.parent / target).exists(), f"{page_id(page)} links to {target}"
    for path in PATH.findall(text):
        assert any((ROOT / folder / path).exists() for folder in FOLDERS), f"{page_id(page)} names the file {path}"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for target in MAKE.findall(text):
        assert target in targets, f"{page_id(page)} names the target make {target}"


MANIFESTS = sorted([*(ROOT / "examples").rglob("*.yaml"), *(ROOT / "charts").rglob("*.yaml")])
WITHOUT_POINT = re.compile(r"(?:\w: |`|\| )([0-9]+[eE]-?[0-9]+)(?=[`,}\s]|$)")
"""A number such as 1e-4 as the value of a field or in a table."""


@pytest.mark.parametrize("page", [*PAGES, *MANIFESTS], ids=page_id)
def test_numbers_with_an_exponent_have_a_decimal_point(page: Path) -> None:
    """PyYAML and other readers of YAML 1.1 read 1e-4 as text, which the API server refuses."""
    wrong = WITHOUT_POINT.findall(page.read_text(encoding="utf-8"))
    assert wrong == [], f"{page_id(page)}: write 1.0e-4 instead of 1e-4"


@pytest.mark.parametrize(("pattern", "minimum"), [(LINK, 50), (PATH, 20), (MAKE, 10)], ids=["link", "path", "make"])
def test_the_patterns_of_the_check_above_match(pattern: re.Pattern[str], minimum: int) -> None:
    assert sum(len(pattern.findall(page.read_text(encoding="utf-8"))) for page in PAGES) >= minimum


def test_the_site_builds_without_a_broken_link(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "index.html").exists()


def test_the_site_navigation_contains_every_page() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if page not in ADRS]
    assert [page for page in pages if page not in navigation] == [], "add these pages to nav in mkdocs.yml"


def test_the_readme_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in DOCS.glob("*.md") if f"docs/{page.name}" not in text] == []


def test_decisions_are_numbered_without_gaps_and_listed() -> None:
    index = (DOCS / "adr/README.md").read_text(encoding="utf-8")
    assert ADRS
    for number, path in enumerate(ADRS, start=1):
        title = path.read_text(encoding="utf-8").splitlines()[0]
        assert path.name.startswith(f"{number:04}-"), f"decision {number} is missing"
        assert title.startswith(f"# {number}. "), f"{path.name}: the title starts with its number"
        assert f"[{title.removeprefix('# ')}]({path.name})" in index, f"add {path.name} to docs/adr/README.md"


def test_troubleshooting_has_one_section_for_each_reason_and_alert() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    titles = re.findall(r"^### (\w+)\n.+$", text, re.MULTILINE)
    assert set(REASONS) == set(Reason)
    alerts = re.findall(r"alert: (\w+)", (ROOT / "charts/finetune-operator/templates/alerts.yaml").read_text())
    missing = {*(reason.value for reason in REASONS), *alerts} - set(titles)
    assert not missing, f"add the sections {sorted(missing)} to docs/troubleshooting.md"
    assert len(titles) == len(set(titles))
    known = {*(reason.value for reason in REASONS), *(condition.value for condition in CONDITIONS), *alerts}
    assert set(titles) <= known, "these sections describe reasons, conditions or alerts that do not exist"


@pytest.mark.parametrize(
    ("title", "counted"),
    [("Preemptions", CountsAs.PREEMPTION), ("Outages", CountsAs.OUTAGE), ("Failures", CountsAs.FAILURE)],
)
def test_troubleshooting_groups_reasons_by_what_they_count_as(title: str, counted: CountsAs) -> None:
    chapters = re.split(r"^## ", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    (chapter,) = (chapter for chapter in chapters if chapter.startswith(title))
    others = {reason.value for reason, doc in REASONS.items() if doc.counts_as not in (None, counted)}
    titles = set(re.findall(r"^### (\w+)", chapter, re.MULTILINE))
    assert {reason.value for reason, doc in REASONS.items() if doc.counts_as is counted} <= titles
    assert not others & titles


FIXED_PATHS = [
    f"{fixed.path}.{name}".removeprefix("spec.")
    for fixed in FIXED
    if not (fixed.until_written or fixed.is_raisable)
    for name in ([name for name, _ in fixed.parts] or [""])
]
ADVICE = re.compile(
    r"\b(?:raise|lower|shorten|halve|double|choose|reduce|request fewer|write|set|change|edit|a shorter)\b", re.I
)


def advised_fixed_fields(text: str) -> list[str]:
    """Return the sentences that advise changing a field of a running job that cannot change."""
    fields = [path.rstrip(".") for path in FIXED_PATHS]
    names = {name.rpartition(".")[2] for name in fields if "." in name}
    found = []
    for sentence in re.split(r"(?<=[.;])\s+", " ".join(text.split())):
        mentioned = [word.removeprefix("spec.") for word in re.findall(r"`([a-z][\w.]*)[`:]", sentence)]
        is_fixed = "fewer nodes" in sentence or any(
            word in names or any(word == field or word.startswith(field + ".") for field in fields)
            for word in mentioned
        )
        if is_fixed and ADVICE.search(sentence) and "new job" not in sentence:
            found.append(sentence)
    return found


def test_runbooks_do_not_advise_changing_what_cannot_change() -> None:
    """Except in a new job. Recognizing advice by its verbs is crude, so the test also checks that it finds some."""
    assert advised_fixed_fields("Shorten `checkpoint.interval`.")
    assert advised_fixed_fields("Halve `training.batchSize`.")
    assert advised_fixed_fields("Raise the quota, or request fewer nodes.")
    assert not advised_fixed_fields("In a new job, halve `training.batchSize`.")
    assert not advised_fixed_fields("Set `recovery.spot.fallbackAfter`.")
    pages = re.split(r"^### ", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    # The sections before the failures describe refused specs, which can be corrected.
    alerts = (ROOT / "charts/finetune-operator/templates/alerts.yaml").read_text(encoding="utf-8")
    found = [sentence for page in pages for sentence in advised_fixed_fields(page)]
    found += [sentence for line in re.findall(r"description: (.+)", alerts) for sentence in advised_fixed_fields(line)]
    found += [sentence for doc in REASONS.values() for sentence in advised_fixed_fields(doc.remedy)]
    assert found == []


def test_local_commands_are_not_listed_as_commands_of_a_cluster() -> None:
    """`finetune describe` knows only jobs of this machine."""
    pages = [page.read_text(encoding="utf-8") for page in DOCS.glob("*.md")]
    blocks = [block for text in pages for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)]
    mixed = [
        block for block in blocks if "kubectl" in block and re.search(r"\bfinetune (?:describe|get|logs|delete)", block)
    ]
    assert mixed == []
