"""Rules that several fields share: what the text of a name, a path, a length of time or an amount looks like."""

from __future__ import annotations

import re

from finetune_operator.api import duration
from finetune_operator.api.rules.rule import Rule, Scope, form

DNS_LABEL = "^[a-z]([-a-z0-9]*[a-z0-9])?$"
DNS_NAME = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
QUANTITY = "^[+]?([0-9]+([.][0-9]*)?|[.][0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][-+]?[0-9]{1,3})?$"
RESOURCE = "^(cpu|memory|ephemeral-storage|hugepages-.+|.+/.+)$"
MANAGER = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*/[a-zA-Z0-9]([-._a-zA-Z0-9]*[a-zA-Z0-9])?$"
BUCKET_URL = "^(s3|gs|az)://[a-z0-9][-._a-z0-9]{1,61}[a-z0-9](/[^/?#]+)*/?$"
WEB_ADDRESS = "^https?://[^/?#]+/?$"
MEMORY_PRESET = "^(auto|cpu|[1-9][0-9]{0,3}GB)$"


def object_name(path: str) -> Rule[str]:
    """A text is the name of a Kubernetes object."""
    name = path.rpartition(".")[2].removesuffix("[]")
    return form(
        path, DNS_NAME, f"{name} is not the name of a Kubernetes object; write lower-case letters, digits, '-' and '.'"
    )


def length_of_time(path: str) -> Rule[str]:
    """A text is a length of time."""
    name = path.rpartition(".")[2]
    return Rule(
        Scope(path, str),
        "",
        f"self.matches(r'{duration.PATTERN}') && self.matches('[1-9]')",
        lambda text: re.fullmatch(duration.PATTERN, text) is not None and re.search("[1-9]", text) is not None,
        f"{name} is not a length of time; write e.g. 90s, 10m or 1h30m",
    )


def absolute(path: str) -> Rule[str]:
    """A text is an absolute path."""
    return Rule(
        Scope(path, str),
        "",
        "self.startsWith('/') && !(self + '/').contains('/../')",
        lambda text: text.startswith("/") and "/../" not in text + "/",
        "path is not absolute; write it from the root on and without '..', e.g. /mnt/checkpoints",
    )


def no_web_address(path: str, example: str) -> Rule[str]:
    """A text is no web address."""
    name = path.rpartition(".")[2]
    return Rule(
        Scope(path, str),
        "",
        "!self.startsWith('http://') && !self.startsWith('https://')",
        lambda text: not text.startswith(("http://", "https://")),
        f"{name} is a web address, which is not read; write its hub id, e.g. {example}, a folder or an s3:// URL",
    )
