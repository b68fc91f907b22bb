"""The state of the random number generators, as it is captured, packed and restored."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch

from finetune_trainer.script.random_state import capture, in_accelerate_format, restore


def _draw() -> tuple[float, float, float, float]:
    return random.random(), random.gauss(0, 1), float(np.random.normal()), float(torch.rand(()))


@pytest.mark.parametrize("before", [0, 3], ids=["fresh", "with a half-used pair of normal numbers"])
def test_a_restored_state_repeats_the_draws(before: int) -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    for _ in range(before):
        _draw()
    state = capture()
    expected = [_draw() for _ in range(700)]
    restore(pickle.loads(pickle.dumps(state)))
    assert [_draw() for _ in range(700)] == expected
    restore(state)
    assert [_draw() for _ in range(700)] == expected


def test_accelerate_reads_the_state() -> None:
    state = pickle.loads(pickle.dumps(capture()))
    values = in_accelerate_format(state, 5)
    random.setstate(values["random_state"])
    np.random.set_state(values["numpy_random_seed"])
    torch.set_rng_state(values["torch_manual_seed"])
    first = _draw()
    restore(state)
    assert _draw() == first
    assert values["step"] == 5


def test_the_state_of_numpy_is_never_an_old_one() -> None:
    """It is copied only after a draw. The second normal number of a pair uses up no word of the generator."""
    np.random.seed(3)
    for draw in (np.random.normal, np.random.normal, np.random.rand, np.random.normal, lambda: None, np.random.rand):
        draw()
        expected: Any = np.random.get_state(legacy=True)
        name, keys, *rest = capture().numpy
        assert (name, keys.tolist(), rest) == (expected[0], expected[1].tolist(), list(expected[2:]))
