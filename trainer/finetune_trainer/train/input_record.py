"""What a run trains on: pinned by the first attempt, and compared by every later one.

The first attempt resolves the commits of the hub and hashes the contents of folders and files. `pin_store` keeps the
result next to the checkpoints. All ranks of all attempts read the pinned commits. An attempt that finds other contents
ends with a message that says what changed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from finetune_contract.identity import InputIdentity, describe_change, merge
from finetune_trainer import patience
from finetune_trainer.data.cache.sample_identity import SampleIdentity
from finetune_trainer.data.hashes import hash_text
from finetune_trainer.data.sources.base import SampleSet
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import DataError, RankError, StorageError
from finetune_trainer.report import Reporter
from finetune_trainer.train.pin_store import Pin, PinStore

_COMMIT, _CONTENT = "commit", "content"


@dataclass
class InputRecord:
    """The inputs of a run. All ranks call the same methods in the same order.

    Attributes:
        job: name of the job, for messages.
        world: the ranks.
        store: the pins.
        reporter: receives the identities for the status.
        pins: the pins of earlier attempts, and of this one so far; the same on all ranks.
        current: what this attempt has found, by name of the pin.
    """

    job: str
    world: World
    store: PinStore
    reporter: Reporter
    pins: dict[str, Pin] = field(default_factory=dict)
    current: dict[str, InputIdentity] = field(default_factory=dict)

    @classmethod
    def open(cls, job: str, world: World, store: PinStore, reporter: Reporter) -> InputRecord:
        """Read the pins. If the ranks share no disk, the first rank that has pins sends them to the others.

        Raises:
            StorageError: they cannot be read or copied.
        """
        own = patience.wait_out("checkpoint storage: reading the pins", store.read_all)
        counts = world.gather_numbers(len(own))
        pins = world.share(own, counts.index(max(counts)))
        if world.local_rank == 0:
            for name in pins.keys() - own.keys():
                store.create(name, pins[name])
        return cls(job, world, store, reporter, pins)

    @property
    def identities(self) -> tuple[InputIdentity, ...]:
        """Return the identity of each input that this attempt has found so far."""
        return merge(self.current.values())

    def revision(self, field_name: str, requested: str | None) -> str | None:
        """Return the revision of the hub to read for a field: the pinned commit, or else what the manifest requests."""
        pin = self.pins.get(_pin_name(field_name, _COMMIT))
        return requested if pin is None else pin.identity.commit

    def add_commit(self, field_name: str, location: str, commit: str, error: type[RankError]) -> None:
        """Record the commit of an input on the hub.

        Raises:
            RankError: of type `error`: an earlier attempt read another commit.
            StorageError: the pin cannot be written, or another attempt has just pinned another commit.
        """
        identity = InputIdentity(field=field_name, location=location, commit=commit)
        self._add(_pin_name(field_name, _COMMIT), Pin(identity), error, [])

    def add_files(self, field_name: str, location: str, files: dict[str, str], error: type[RankError]) -> None:
        """Record the fingerprints of an input's files, by name.

        Raises:
            RankError: of type `error`: an earlier attempt read other contents.
            StorageError: see `add_commit`.
        """
        content = _hash_files(files)
        identity = InputIdentity(field=field_name, location=location, content=content)
        self._add(_pin_name(field_name, _CONTENT), Pin(identity, files), error, [])

    def add_samples(self, field_name: str, location: str, found: SampleIdentity, samples: SampleSet) -> None:
        """Record the samples of a data set.

        Raises:
            DataError: an earlier attempt read other samples.
            StorageError: see `add_commit`.
        """
        name = _pin_name(field_name, _CONTENT)
        identity = InputIdentity(field=field_name, location=location, content=found.digest, samples=len(found))
        details = []
        before = self.pins.get(name)
        if before is not None and before.rows and (index := found.first_difference(before.rows)) is not None:
            place = samples.name(index) if index < len(found) else f"row {index} is missing"
            details.append(f"first difference: {place}")
        self._add(name, Pin(identity, rows=found.rows), DataError, details)

    def has_samples(self, field_name: str) -> bool:
        """Return whether an earlier attempt has recorded the samples of a data set."""
        return bool(self.pins.get(_pin_name(field_name, _CONTENT)))

    def confirm_files(self, field_name: str, location: str, changed: str | None) -> None:
        """Receive the result of each rank's comparison of the files of a data set with their recorded hashes.

        Args:
            field_name: the field that names the data set.
            location: what the manifest has there.
            changed: the first file whose content has changed, on this rank; None if none has.

        Raises:
            DataError: with a file that has changed, on all ranks.
        """
        counts = self.world.gather_numbers(int(changed is not None))
        if any(counts):
            file = self.world.share(changed, counts.index(1))
            summary = (
                f"{field_name}: {location} has changed since the job began: contents differ; first difference: {file}"
            )
            raise DataError(changed_message(summary, self.job))

    def compare(self, recorded: Iterable[InputIdentity]) -> list[str]:
        """Return how this attempt's inputs differ from recorded ones, one text for each that differs."""
        now = {each.field: each for each in self.identities}
        return [
            f"{before.field}: {before.location} has changed: {change}"
            for before in recorded
            if before.field in now and (change := describe_change(before, now[before.field])) is not None
        ]

    def _add(self, name: str, found: Pin, error: type[RankError], details: list[str]) -> None:
        self._check_ranks(found.identity, error)
        before = self.pins.get(name)
        if before is None:
            before = self._create(name, found)
        commit = self.pins.get(_pin_name(found.identity.field, _COMMIT))
        # A commit fixes the contents, whatever a newer trainer reads of them.
        if (commit is None or found.identity.commit is not None) and (
            change := describe_change(before.identity, found.identity)
        ):
            raise error(self.world.share(self._changed(before, found, change, details)))
        self.current[name] = found.identity
        if self.world.is_first:
            self.reporter.inputs(self.identities)

    def _check_ranks(self, found: InputIdentity, error: type[RankError]) -> None:
        """Refuse an input that is not the same on all ranks.

        Raises:
            RankError: with the first rank that differs from rank 0.
        """
        first = self.world.share(found)
        change = describe_change(first, found)
        differing = [rank for rank, differs in enumerate(self.world.gather_numbers(int(change is not None))) if differs]
        if differing:
            what = self.world.share(change, differing[0])
            raise error(
                f"{found.field}: {found.location} is not the same on all nodes: rank {differing[0]} differs from rank "
                f"0 ({what}); copy the same contents to every node, or use shared storage"
            )

    def _create(self, name: str, found: Pin) -> Pin:
        """Pin an input, and return the pin.

        Raises:
            StorageError: it cannot be written, or another attempt has just pinned something else.
        """
        pin, problem = found, ""
        if self.world.is_first and not self.store.create(name, found):
            pin = self.store.read_all().get(name, found)
            if change := describe_change(pin.identity, found.identity):
                problem = f"{found.identity.field}: another attempt has just recorded it differently ({change})"
        if problem := self.world.share(problem):
            raise StorageError(problem)
        self.pins[name] = pin
        if self.world.local_rank == 0 and not self.world.is_first:
            self.store.create(name, pin)
        return pin

    def _changed(self, before: Pin, found: Pin, change: str, details: list[str]) -> str:
        """Return the message for an input that has changed since the first attempt."""
        names = sorted(before.files.keys() | found.files.keys())
        changed = [name for name in names if before.files.get(name) != found.files.get(name)] if before.files else []
        files = [f"first changed file: {changed[0]}"] if changed else []
        return changed_message(
            f"{found.identity.field}: {found.identity.location} has changed since the job began: "
            f"{'; '.join([change, *details, *files])}",
            self.job,
        )


def changed_message(changes: str, job: str) -> str:
    """Return the message for inputs that have changed, with the remedy."""
    return (
        f"{changes}; restore what the job began with, or create another job with checkpoint.from: {{job: {job}}}, "
        "which continues from the newest checkpoint with what is there now"
    )


def _hash_files(files: dict[str, str]) -> str:
    return hash_text(*(part for name in sorted(files) for part in (name, files[name])))


def _pin_name(field_name: str, kind: str) -> str:
    return f"{field_name}.{kind}"
