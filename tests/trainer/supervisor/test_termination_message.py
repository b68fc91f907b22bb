"""The termination message of a supervisor, and the exit code of its pod."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_contract.heartbeat import RankEnd, Termination
from finetune_trainer.supervisor.termination_message import MAX_MESSAGE_BYTES, cause_first, fit, pod_exit_code

ends = st.lists(
    st.builds(
        RankEnd,
        rank=st.integers(0, 10_000),
        exit_code=st.sampled_from([0, 1, 64, 75, 76, 137, 143]),
        last_words=st.text(max_size=2000),
    ),
    min_size=1,
    max_size=64,
)


@given(ends)
def test_message_always_fits_and_keeps_the_cause(given_ends: list[RankEnd]) -> None:
    text = fit(Termination(attempt=1, exit_code=pod_exit_code(given_ends), ends=cause_first(given_ends)))
    assert len(text.encode()) <= MAX_MESSAGE_BYTES
    kept = Termination.model_validate_json(text)
    assert kept.ends[0].rank == cause_first(given_ends)[0].rank
    assert kept.exit_code == pod_exit_code(given_ends)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([0, 0], 0), ([75, 75], 75), ([0, 75], 75), ([76, 137], 137), ([76, 75], 76), ([75, 1], 1), ([143, 76], 143)],
)
def test_pod_exit_code(codes: list[int], expected: int) -> None:
    assert pod_exit_code([RankEnd(rank=rank, exit_code=code) for rank, code in enumerate(codes)]) == expected
