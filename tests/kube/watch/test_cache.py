"""The cache against a model: whatever order lists, watches and answers come in, it is never ahead and never forgets."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.cluster.kube.watch.cache import Cache, Entry, ObjectKey

A, B = ObjectKey("ns", "a"), ObjectKey("ns", "b")


def new_cache(changes: list[tuple[str, str | None, str | None]] | None = None) -> Cache[str]:
    told = changes if changes is not None else []
    return Cache(lambda value: value[0], lambda key, old, new: told.append((key.name, old, new)))


def test_watch_events_are_kept_and_told_once() -> None:
    told: list[tuple[str, str | None, str | None]] = []
    cache = new_cache(told)
    cache.see("", A, Entry(1, "x1"))
    cache.see("", A, Entry(1, "x1"))
    cache.see("", A, Entry(2, "x2"))
    cache.see_deleted("", A, 3)
    assert told == [("a", None, "x1"), ("a", "x1", "x2"), ("a", "x2", None)]
    assert cache.get(A) is None
    assert list(cache.group("x")) == []


def test_an_answer_is_read_back_before_the_watch_tells_of_it() -> None:
    cache = new_cache()
    cache.replace("", [(A, Entry(1, "x1"))], 5)
    cache.put_written(A, Entry(9, "x9"))
    assert cache.get(A) == "x9"
    # The watch is still at older versions of it.
    cache.see("", A, Entry(7, "x7"))
    assert cache.get(A) == "x9"
    assert cache.knows(A, 9)
    assert not cache.knows(A, 10)


def test_an_answer_that_comes_after_the_deletion_brings_nothing_back() -> None:
    cache = new_cache()
    cache.see("", A, Entry(1, "x1"))
    cache.see_deleted("", A, 8)
    cache.put_written(A, Entry(6, "x6"))
    assert cache.get(A) is None


def test_a_new_list_drops_what_went_while_the_watch_was_expired() -> None:
    cache = new_cache()
    cache.replace("", [(A, Entry(1, "x1")), (B, Entry(2, "y2"))], 2)
    cache.put_written(A, Entry(30, "x30"))
    cache.replace("", [], 20)
    assert cache.get(B) is None, "gone while nobody watched"
    assert cache.get(A) == "x30", "written after the list was made"


def test_namespaces_are_listed_apart() -> None:
    cache, other = new_cache(), ObjectKey("other", "a")
    cache.replace("ns", [(A, Entry(1, "x1"))], 1)
    cache.replace("other", [(other, Entry(2, "x2"))], 2)
    cache.replace("ns", [], 3)
    assert cache.get(A) is None
    assert cache.get(other) == "x2"
    assert (cache.seen("ns"), cache.seen("other"), cache.seen("")) == (3, 2, 0)


@dataclass
class Server:
    """One object's history, a cache that follows it by a watch, and what the cache has held."""

    cache: Cache[str] = field(default_factory=new_cache)
    history: list[str | None] = field(default_factory=list)
    """What was there after each change; a change's number from 1 is its version."""
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
                self.cache.see_deleted("", A, self.watched)
            else:
                self.cache.see("", A, Entry(self.watched, value))

    def answer(self, version: int) -> None:
        """The answer to an earlier write comes, perhaps late."""
        value = self.history[version - 1]
        if value is not None:
            self.cache.put_written(A, Entry(version, value))

    def list(self) -> None:
        self.watched = len(self.history)
        value = self.history[-1] if self.history else None
        listed = [] if value is None else [(A, Entry(self.watched, value))]
        self.cache.replace("", listed, self.watched)

    def check(self) -> None:
        """The cache holds a state that the object has had, no older than the last one that it held."""
        found = self.cache.get(A)
        assert found in {*self.history, None}
        if found is not None:
            assert int(found[1:]) >= self.held
            self.held = int(found[1:])


@given(st.lists(st.sampled_from(["write", "delete", "watch", "answer", "list"]), max_size=40), st.data())
def test_never_ahead_never_back_and_right_in_the_end(steps: list[str], data: st.DataObject) -> None:
    server = Server()
    for step in steps:
        if step == "answer":
            if server.history:
                server.answer(data.draw(st.integers(1, len(server.history))))
        else:
            getattr(server, step)()
        server.check()
    while server.watched < len(server.history):
        server.watch()
    assert server.cache.get(A) == (server.history[-1] if server.history else None)
