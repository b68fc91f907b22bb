"""The last observed objects of one type: the pure part of an informer.

A reflector fills it from lists and watches; the operator adds the responses to its own writes. A response is stored
only if the watch has not reached its version yet: so a write is visible at once, and an object that was deleted since
is not stored again. Resource versions of one type are compared as integers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Generic, NamedTuple, Protocol, TypeVar

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


class ObjectKey(NamedTuple):
    """Namespace and name of an object; the namespace of a cluster-scoped object is empty."""

    namespace: str
    name: str


class ChangeListener(Protocol[T_contra]):
    """Called after every change of a cache."""

    def __call__(self, key: ObjectKey, old: T_contra | None, new: T_contra | None) -> None:
        """Handle a change. `old` is None for a new object, `new` is None for a deleted one."""


class Entry(NamedTuple, Generic[T]):
    """A value and its resource version."""

    version: int
    value: T


class Cache(Generic[T]):
    """Values by key and by group. A group is what a value belongs to, such as its job."""

    def __init__(self, group: Callable[[T], Hashable], changed: ChangeListener[T]) -> None:
        self._group = group
        self._changed = changed
        self._entries: dict[ObjectKey, Entry[T]] = {}
        self._groups: dict[Hashable, dict[ObjectKey, T]] = {}
        self._synced: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: ObjectKey) -> T | None:
        """Return the value of a key; None if there is none."""
        entry = self._entries.get(key)
        return None if entry is None else entry.value

    def group(self, group: Hashable) -> Iterable[T]:
        """Return all values of a group."""
        return self._groups.get(group, {}).values()

    def values(self) -> Iterator[T]:
        """Return all values."""
        return (entry.value for entry in self._entries.values())

    def synced_version(self, scope: str) -> int:
        """Return the newest resource version that the list or the watch of a scope has reached; 0 if there is none.

        A scope is a namespace, or the empty string for all of them. Each reflector has one scope.
        """
        return self._synced.get(scope, 0)

    def has_version(self, key: ObjectKey, version: int) -> bool:
        """Return whether this version of an object, or a newer one, is cached."""
        entry = self._entries.get(key)
        return entry is not None and entry.version >= version

    def replace(self, scope: str, values: Iterable[tuple[ObjectKey, Entry[T]]], version: int) -> None:
        """Store a complete list of a version. Objects that are not in it are removed, unless they are newer."""
        listed = dict(values)
        self._synced[scope] = version
        old = [(key, entry.version) for key, entry in self._entries.items() if scope in ("", key.namespace)]
        for key, old_version in old:
            if key not in listed and old_version <= version:
                self._remove(key)
        for key, entry in listed.items():
            self._put(key, entry)

    def update(self, scope: str, key: ObjectKey, entry: Entry[T]) -> None:
        """Store an object from a watch event."""
        self.advance(scope, entry.version)
        self._put(key, entry)

    def delete(self, scope: str, key: ObjectKey, version: int) -> None:
        """Remove an object that a watch event reports as deleted."""
        self.advance(scope, version)
        old = self._entries.get(key)
        if old is not None and old.version <= version:
            self._remove(key)

    def advance(self, scope: str, version: int) -> None:
        """Record that the watch has reported all changes up to this version (a bookmark)."""
        self._synced[scope] = max(self.synced_version(scope), version)

    def put_written(self, key: ObjectKey, entry: Entry[T]) -> None:
        """Store the response to one of our writes, if the watch has not reached its version yet."""
        if entry.version > max(self.synced_version(""), self.synced_version(key.namespace)):
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
