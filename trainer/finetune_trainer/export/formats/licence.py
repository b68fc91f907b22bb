"""Licence of a base: that of its model card, if it has one. What is trained on a base is under the base's terms."""

from __future__ import annotations

import re
from dataclasses import dataclass

from finetune_trainer.models.family import Family

_README = "README.md"
_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
_FIELD = re.compile(r"^(license|license_name|license_link):[ \t]*[\"']?([^\"'\n#]+)", re.MULTILINE)
_OTHER = "other"
"""The hub's identifier of a licence that has no identifier."""


@dataclass(frozen=True)
class Licence:
    """A licence, as in the front matter of a model card.

    Attributes:
        identifier: one of the identifiers that the hub documents.
        own_name: name of a licence without an identifier.
        link: URL of its text.
    """

    identifier: str
    own_name: str | None = None
    link: str | None = None

    @property
    def name(self) -> str:
        """The name for readers."""
        return self.own_name or self.identifier

    def front_matter(self) -> dict[str, str]:
        """Return the fields of a model card."""
        fields = {"license": self.identifier, "license_name": self.own_name, "license_link": self.link}
        return {name: value for name, value in fields.items() if value is not None}


def licence_of(family: Family) -> Licence | None:
    """Return the licence in the model card of the base; None if it is unknown."""
    card = family.pipeline.folder / _README
    if not card.is_file():
        return None
    return parse_licence(card.read_text(encoding="utf-8", errors="replace"))


def parse_licence(card: str) -> Licence | None:
    """Return the licence in the text of a model card; None if it names none. Pure."""
    front = _FRONT.match(card)
    found = _FIELD.findall(front[1]) if front else ()
    fields = {name: value.strip() for name, value in found if value.strip()}
    own_name, link = fields.get("license_name"), fields.get("license_link", "")
    if "license" not in fields and own_name is None:
        return None
    # A file next to the card of the base is not next to the new card.
    return Licence(fields.get("license", _OTHER), own_name, link if "://" in link else None)
