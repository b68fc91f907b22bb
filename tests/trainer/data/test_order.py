"""Tests of the order of the samples, and of its division over ranks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.data.sampling.order import micro_batches, permute, rank_share, sample_at, total_steps

SEEDS = st.integers(0, 2**64)
POSITIVE = st.integers(1, 500)


@given(key=st.integers(0, 2**64 - 1), size=POSITIVE)
def test_permute_is_a_permutation(key: int, size: int) -> None:
    assert sorted(permute(key, size, index) for index in range(size)) == list(range(size))


@given(seed=SEEDS, num_samples=POSITIVE, epoch=st.integers(0, 1000))
def test_each_epoch_has_each_sample_once(seed: int, num_samples: int, epoch: int) -> None:
    first = epoch * num_samples
    refs = [sample_at(seed, num_samples, position) for position in range(first, first + num_samples)]
    assert {ref.epoch for ref in refs} == {epoch}
    assert sorted(ref.index for ref in refs) == list(range(num_samples))


def test_order_differs_by_epoch_and_by_seed() -> None:
    orders = {
        tuple(sample_at(seed, 50, position).index for position in range(first, first + 50))
        for seed in range(4)
        for first in (0, 50, 100)
    }
    assert len(orders) == 12


def test_first_sample_is_uniformly_distributed() -> None:
    counts = [0] * 8
    for seed in range(4000):
        counts[sample_at(seed, 8, 0).index] += 1
    # The standard deviation of each count is 21.
    assert all(400 < count < 600 for count in counts)


def test_order_is_stable_across_releases() -> None:
    """A run that resumes from a checkpoint of an older release trains on the same samples."""
    assert [sample_at(1, 10, position).index for position in range(10)] == [1, 4, 9, 3, 7, 6, 5, 2, 8, 0]


@given(step=st.integers(0, 10_000), global_batch=POSITIVE, world_size=st.integers(1, 64), batch_size=st.integers(1, 16))
def test_shares_of_all_ranks_are_exactly_the_global_batch(
    step: int, global_batch: int, world_size: int, batch_size: int
) -> None:
    shares = [rank_share(step, global_batch, rank, world_size) for rank in range(world_size)]
    positions = [position for share in shares for part in micro_batches(share, batch_size) for position in part]
    assert positions == list(range(step * global_batch, (step + 1) * global_batch))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(world_sizes=st.lists(st.integers(1, 16), min_size=1, max_size=6), global_batch=st.integers(1, 32))
def test_elastic_worlds_train_on_the_same_samples(world_sizes: list[int], global_batch: int) -> None:
    """The number of ranks changes with every step."""
    samples = [
        sample_at(7, 23, position)
        for step, world_size in enumerate(world_sizes)
        for rank in range(world_size)
        for position in rank_share(step, global_batch, rank, world_size)
    ]
    assert samples == [sample_at(7, 23, position) for position in range(len(world_sizes) * global_batch)]


def test_total_steps_from_steps_or_epochs() -> None:
    assert total_steps(40, None, 10, 4) == 40
    assert total_steps(None, 2, 10, 4) == 5
    assert total_steps(None, 1, 9, 4) == 3
