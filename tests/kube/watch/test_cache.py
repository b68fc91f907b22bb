"""The cache against a model: in any order of lists, watch events and responses, it is never ahead and loses nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.cluster.kube.watch.cache import Cache, Entry, ObjectKey

A, B = ObjectKey("ns", "a"), ObjectKey("ns", "b")


def new_cache(changes: list[tuple[str, str | None, str | None]] | None = None) -> Cache[str]:
    recorded = changes if changes is not None else []
    return Cache(lambda value: value[0], lambda key, old, new: recorded.append((key.name, old, new)))


def test_each_watch_event_is_stored_and_reported_once() -> None:
    changes: list[tuple[str, str | None, str | None]] = []
    cache = new_cache(changes)
    cache.update("", A, Entry(1, "x1"))
    cache.update("", A, Entry(1, "x1"))
    cache.update("", A, Entry(2, "x2"))
    cache.delete("", A, 3)
    assert changes == [("a", None, "x1"), ("a", "x1", "x2"), ("a", "x2", None)]
    assert cache.get(A) is None
    assert list(cache.group("x")) == []


def test_response_is_visible_before_its_watch_event() -> None:
    cache = new_cache()
    cache.replace("", [(A, Entry(1, "x1"))], 5)
    cache.put_written(A, Entry(9, "x9"))
    assert cache.get(A) == "x9"
    # The watch still reports older versions.
    cache.update("", A, Entry(7, "x7"))
    assert cache.get(A) == "x9"
    assert cache.has_version(A, 9)
    assert not cache.has_version(A, 10)


def test_response_that_arrives_after_the_deletion_restores_nothing() -> None:
    cache = new_cache()
    cache.update("", A, Entry(1, "x1"))
    cache.delete("", A, 8)
    cache.put_written(A, Entry(6, "x6"))
    assert cache.get(A) is None


def test_new_list_removes_objects_that_were_deleted_while_the_watch_was_expired() -> None:
    cache = new_cache()
    cache.replace("", [(A, Entry(1, "x1")), (B, Entry(2, "y2"))], 2)
    cache.put_written(A, Entry(30, "x30"))
    cache.replace("", [], 20)
    assert cache.get(B) is None, "deleted while no watch was running"
    assert cache.get(A) == "x30", "written after the list was created"


def test_namespaces_are_listed_separately() -> None:
    cache, other = new_cache(), ObjectKey("other", "a")
    cache.replace("ns", [(A, Entry(1, "x1"))], 1)
    cache.replace("other", [(other, Entry(2, "x2"))], 2)
    cache.replace("ns", [], 3)
    assert cache.get(A) is None
    assert cache.get(other) == "x2"
    assert (cache.synced_version("ns"), cache.synced_version("other"), cache.synced_version("")) == (3, 2, 0)


@dataclass
class ObjectHistory:
    """The history of one object, a cache that follows it by a watch, and the newest version that the cache has had."""

    cache: Cache[str] = field(default_factory=new_cache)
    history: list[str | None] = field(default_factory=list)
    """State after each change; the number of a change, starting at 1, is its version."""
    watched: int = 0
    held: int = 0

    def write(self) -> None:
        self.history.append(f"x{len(self.history) + 1}")

    def delete(self) -> None:
        self.history.append(None)

    def watch(self) -> None:
        if self.watched < len(self.history):
            self.watched += 1
            value = self.history[self.watched - 1]
            if value is None:
                self.cache.delete("", A, self.watched)
            else:
                self.cache.update("", A, Entry(self.watched, value))

    def answer(self, version: int) -> None:
        """Deliver the response to an earlier write."""
        value = self.history[version - 1]
        if value is not None:
            self.cache.put_written(A, Entry(version, value))

    def list(self) -> None:
        self.watched = len(self.history)
        value = self.history[-1] if self.history else None
        listed = [] if value is None else [(A, Entry(self.watched, value))]
        self.cache.replace("", listed, self.watched)

    def check(self) -> None:
        """Check that the cache contains a state that the object has had, and no older one than before."""
        found = self.cache.get(A)
        assert found in {*self.history, None}
        if found is not None:
            assert int(found[1:]) >= self.held
            self.held = int(found[1:])


@given(st.lists(st.sampled_from(["write", "delete", "watch", "answer", "list"]), max_size=40), st.data())
def test_cache_is_never_ahead_and_correct_at_the_end(steps: list[str], data: st.DataObject) -> None:
    model = ObjectHistory()
    for step in steps:
        if step == "answer":
            if model.history:
                model.answer(data.draw(st.integers(1, len(model.history))))
        else:
            getattr(model, step)()
        model.check()
    while model.watched < len(model.history):
        model.watch()
    assert model.cache.get(A) == (model.history[-1] if model.history else None)
