"""The identity of the samples that a run trains on: one hash of all of them, and a short hash of each."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from finetune_trainer.data.hashes import hash_text

ROW_BYTES = 4
"""Bytes kept of each sample's hash: they only find the first difference. The hash of all samples decides."""


@dataclass(frozen=True)
class SampleIdentity:
    """The identity of a list of samples.

    Attributes:
        digest: SHA-256 of all samples, in hex; it depends on their order.
        rows: the first `ROW_BYTES` bytes of each sample's own hash, one after the other.
    """

    digest: str
    rows: bytes

    def __len__(self) -> int:
        return len(self.rows) // ROW_BYTES

    @classmethod
    def join(cls, parts: Sequence[SampleIdentity]) -> SampleIdentity:
        """Return the identity of several lists of samples, one after the other."""
        if len(parts) == 1:
            return parts[0]
        return cls(hash_text(*(part.digest for part in parts)), b"".join(part.rows for part in parts))

    def first_difference(self, rows: bytes) -> int | None:
        """Return the index of the first sample that differs from other rows; None if the rows are equal.

        If one list is the beginning of the other, this is the first index that only one of them has.
        """
        if self.rows == rows:
            return None
        common = min(len(self.rows), len(rows)) // ROW_BYTES
        spans = (slice(number * ROW_BYTES, (number + 1) * ROW_BYTES) for number in range(common))
        return next((number for number, span in enumerate(spans) if self.rows[span] != rows[span]), common)


class SampleHasher:
    """Computes the identity of samples that are added in their order."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._rows = bytearray()

    def add(self, image_id: str, condition_id: str, repeats: int, captions: Sequence[str]) -> None:
        """Add a sample.

        Args:
            image_id: SHA-256 of the image's bytes.
            condition_id: SHA-256 of the conditioning image's bytes; empty if the run reads none.
            repeats: number of its uses in an epoch.
            captions: its captions; none if the run reads none.
        """
        row = bytes.fromhex(hash_text(image_id, condition_id, str(repeats), *captions))
        self._digest.update(row)
        self._rows += row[:ROW_BYTES]

    @property
    def identity(self) -> SampleIdentity:
        """Return the identity of the samples so far."""
        return SampleIdentity(self._digest.hexdigest(), bytes(self._rows))
