"""Licence of a base: that of its model card, if it has one. What is trained on a base is under the base's terms."""

from __future__ import annotations

import re

from finetune_trainer.models.family import Family

_README = "README.md"
_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
_FIELD = re.compile(r"^(license|license_name):\s*[\"']?([^\"'\n#]+)", re.MULTILINE)


def licence_of(family: Family) -> str | None:
    """Return the licence in the model card of the base; None if it is unknown."""
    card = family.pipeline.folder / _README
    if not card.is_file():
        return None
    front = _FRONT.match(card.read_text(encoding="utf-8", errors="replace"))
    fields = dict(_FIELD.findall(front[1])) if front else {}
    # The hub writes "other" if the licence has its own name.
    return (fields.get("license_name") or fields.get("license") or "").strip() or None
