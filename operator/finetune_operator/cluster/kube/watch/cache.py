"""What was last seen of one kind of object: the pure half of an informer.

Fed by a reflector with what it lists and watches, and by the operator with the server's answers to its own writes. An
answer is taken only where the watch has not come so far yet: so a write is read back at once, and an object that was
deleted since does not come back to life. Resource versions of one kind are compared as the integers that they are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Generic, NamedTuple, Protocol, TypeVar

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


class ObjectKey(NamedTuple):
    """Names an object of a kind; the namespace of one that has none is empty."""

    namespace: str
    name: str


class Changed(Protocol[T_contra]):
    """Told of every change, after it."""

    def __call__(self, key: ObjectKey, old: T_contra | None, new: T_contra | None) -> None:
        """Take the old value, None where there was none, and the new one, None where it is gone."""


class Entry(NamedTuple, Generic[T]):
    """A value and its resource version."""

    version: int
    value: T


class Cache(Generic[T]):
    """Values by key, and by group: what a value belongs to, such as its job."""

    def __init__(self, group: Callable[[T], Hashable], changed: Changed[T]) -> None:
        self._group = group
        self._changed = changed
        self._entries: dict[ObjectKey, Entry[T]] = {}
        self._groups: dict[Hashable, dict[ObjectKey, T]] = {}
        self._seen: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: ObjectKey) -> T | None:
        """The value of a key; None where there is none."""
        entry = self._entries.get(key)
        return None if entry is None else entry.value

    def group(self, group: Hashable) -> Iterable[T]:
        """All values that belong to something."""
        return self._groups.get(group, {}).values()

    def values(self) -> Iterator[T]:
        """All values."""
        return (entry.value for entry in self._entries.values())

    def seen(self, scope: str) -> int:
        """The newest resource version that the list or the watch of a scope has come to; 0: none.

        A scope is a namespace, or the empty text for all of them. All that a reflector feeds is of one scope.
        """
        return self._seen.get(scope, 0)

    def knows(self, key: ObjectKey, version: int) -> bool:
        """Whether this version of an object, or a newer one, is here: then it need not be read."""
        entry = self._entries.get(key)
        return entry is not None and entry.version >= version

    def replace(self, scope: str, values: Iterable[tuple[ObjectKey, Entry[T]]], version: int) -> None:
        """Take a whole list as of a version: what is not in it is gone, unless it was written later."""
        listed = dict(values)
        self._seen[scope] = version
        old = [(key, entry.version) for key, entry in self._entries.items() if scope in ("", key.namespace)]
        for key, old_version in old:
            if key not in listed and old_version <= version:
                self._remove(key)
        for key, entry in listed.items():
            self._put(key, entry)

    def see(self, scope: str, key: ObjectKey, entry: Entry[T]) -> None:
        """Take an object that the watch tells of."""
        self.see_version(scope, entry.version)
        self._put(key, entry)

    def see_deleted(self, scope: str, key: ObjectKey, version: int) -> None:
        """Take an object's end that the watch tells of."""
        self.see_version(scope, version)
        old = self._entries.get(key)
        if old is not None and old.version <= version:
            self._remove(key)

    def see_version(self, scope: str, version: int) -> None:
        """Take a bookmark: nothing has happened up to this version that was not told."""
        self._seen[scope] = max(self.seen(scope), version)

    def put_written(self, key: ObjectKey, entry: Entry[T]) -> None:
        """Take the server's answer to a write of ours, where the watch will tell of it only later."""
        if entry.version > max(self.seen(""), self.seen(key.namespace)):
            self._put(key, entry)

    def _put(self, key: ObjectKey, entry: Entry[T]) -> None:
        old = self._entries.get(key)
        if old is not None and old.version >= entry.version:
            return
        if old is not None:
            self._leave_group(key, old.value)
        self._entries[key] = entry
        self._groups.setdefault(self._group(entry.value), {})[key] = entry.value
        self._changed(key, old.value if old is not None else None, entry.value)

    def _remove(self, key: ObjectKey) -> None:
        old = self._entries.pop(key)
        self._leave_group(key, old.value)
        self._changed(key, old.value, None)

    def _leave_group(self, key: ObjectKey, value: T) -> None:
        group = self._group(value)
        members = self._groups[group]
        del members[key]
        if not members:
            del self._groups[group]
