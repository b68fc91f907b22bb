"""Rules that several fields share: the form of a name, a path, a duration or an amount."""

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
    """Return the rule that a string is a valid name of a Kubernetes object."""
    name = path.rpartition(".")[2].removesuffix("[]")
    return form(
        path,
        DNS_NAME,
        f"{name} is not a valid name of a Kubernetes object; write lower-case letters, digits, '-' and '.'",
    )


def is_duration(path: str) -> Rule[str]:
    """Return the rule that a string is a duration."""
    name = path.rpartition(".")[2]
    return Rule(
        Scope(path, str),
        "",
        f"self.matches(r'{duration.PATTERN}') && self.matches('[1-9]')",
        lambda text: re.fullmatch(duration.PATTERN, text) is not None and re.search("[1-9]", text) is not None,
        f"{name} is not a duration; write e.g. 90s, 10m or 1h30m",
    )


def absolute_path(path: str) -> Rule[str]:
    """Return the rule that a string is an absolute path."""
    return Rule(
        Scope(path, str),
        "",
        "self.startsWith('/') && !(self + '/').contains('/../')",
        lambda text: text.startswith("/") and "/../" not in text + "/",
        "path is not an absolute path; write it from the root and without '..', e.g. /mnt/checkpoints",
    )


def no_web_address(path: str, example: str) -> Rule[str]:
    """Return the rule that a string is not a web address."""
    name = path.rpartition(".")[2]
    return Rule(
        Scope(path, str),
        "",
        "!self.startsWith('http://') && !self.startsWith('https://')",
        lambda text: not text.startswith(("http://", "https://")),
        f"{name} is a web address, which cannot be read; write its hub id, e.g. {example}, a folder or an s3:// URL",
    )
