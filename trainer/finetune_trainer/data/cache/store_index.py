"""The index file of a folder of shards: which items each shard holds. Read and written by `store`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

INDEX_NAME = "items.index"
_DIGEST_BYTES = 16
"""Size of the form of a key that the index stores."""
_CHECKSUM_BYTES = 32
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class ShardItems:
    """The items of one shard.

    Attributes:
        name: name of its file.
        size: size of the file in bytes.
        parts: names of the tensors of each item.
        digests: the keys of the items, as the index stores them.
    """

    name: str
    size: int
    parts: tuple[str, ...]
    digests: Sequence[bytes]


def pack_index(listing: Sequence[ShardItems]) -> bytes:
    """Return the content of the file: a checksum, the length of the list of shards, this list as JSON, all digests."""
    shards = [[each.name, each.size, each.parts, len(each.digests)] for each in listing]
    header = json.dumps(shards).encode()
    digests = b"".join(digest for each in listing for digest in each.digests)
    content = len(header).to_bytes(_LENGTH_BYTES, "little") + header + digests
    return hashlib.sha256(content).digest() + content


def unpack_index(data: bytes) -> list[ShardItems]:
    """Return the items of each shard; nothing if the file is damaged: the shards themselves are then read."""
    content = data[_CHECKSUM_BYTES:]
    if hashlib.sha256(content).digest() != data[:_CHECKSUM_BYTES]:
        return []
    start = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
    listing = []
    for name, size, parts, count in json.loads(content[_LENGTH_BYTES:start]):
        end = start + _DIGEST_BYTES * count
        digests = [content[at : at + _DIGEST_BYTES] for at in range(start, end, _DIGEST_BYTES)]
        listing.append(ShardItems(name, size, tuple(parts), digests))
        start = end
    return listing
