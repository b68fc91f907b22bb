"""The pages for people: nothing that they can meet is missing, and no link leads nowhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from finetune_operator.api.conditions import CONDITIONS
from finetune_operator.api.reasons import REASONS, CountsAs, Reason

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = (
    "install",
    "first-job",
    "recovery",
    "storage",
    "sizing",
    "security",
    "upgrade",
    "troubleshooting",
    "comparison",
)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    path = DOCS / f"{page}.md"
    text = path.read_text()
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
        assert (path.parent / target).exists(), f"{page}.md links to {target}"
    for file in re.findall(r"\b(?:examples|crds|charts/finetune-operator/files)/[\w.-]+\.yaml", text):
        assert (ROOT / file).exists(), f"{page}.md names {file}"
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"make {target}"


def test_troubleshooting_has_every_reason_once_and_says_something_of_it() -> None:
    sections = re.findall(r"^### (\w+)\n(.+)$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    titles = [title for title, _ in sections]
    assert set(REASONS) == set(Reason)
    assert {reason.value for reason in REASONS} <= set(titles)
    assert len(titles) == len(set(titles))
    # Nor does it explain what nobody can meet any more.
    alerts = re.findall(r"alert: (\w+)", (ROOT / "charts/finetune-operator/templates/alerts.yaml").read_text())
    assert set(titles) <= {
        *(reason.value for reason in REASONS),
        *(condition.value for condition in CONDITIONS),
        *alerts,
    }


@pytest.mark.parametrize(
    ("title", "counted"),
    [("Capacity was taken away", CountsAs.PREEMPTION), ("An attempt failed", CountsAs.FAILURE)],
)
def test_troubleshooting_says_what_spends_failures(title: str, counted: CountsAs) -> None:
    chapters = re.split(r"^## ", (DOCS / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    (chapter,) = (chapter for chapter in chapters if chapter.startswith(title))
    others = {reason.value for reason, about in REASONS.items() if about.counts_as not in (None, counted)}
    titles = set(re.findall(r"^### (\w+)", chapter, re.MULTILINE))
    assert {reason.value for reason, about in REASONS.items() if about.counts_as is counted} <= titles
    assert not others & titles


def test_the_readme_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert [page for page in PAGES if f"docs/{page}.md" not in text] == []
