"""The passes that the bench of the exchange replays, and the share that they can hide."""

from __future__ import annotations

import pytest
import torch

from testing.measure.exchange import ModelPass, ReplayedPass, Timeline, bound_of, hidden_bound


@pytest.mark.parametrize(
    ("ready", "exchanges", "end", "share"),
    [
        # One bucket, complete at the end of the pass: nothing is hidden.
        ([4.0], [2.0], 4.0, 0.0),
        # The first of two buckets is hidden completely.
        ([1.0, 4.0], [2.0, 2.0], 4.0, 0.5),
        # The network is the bottleneck: the sums follow each other from the first bucket on.
        ([1.0, 2.0, 3.0], [4.0, 4.0, 4.0], 3.0, 1 - 10 / 12),
        # All buckets are complete early.
        ([0.0, 0.5], [1.0, 1.0], 4.0, 1.0),
    ],
)
def test_bound_of_the_hidden_share(ready: list[float], exchanges: list[float], end: float, share: float) -> None:
    assert hidden_bound(ready, exchanges, end) == pytest.approx(share)


def test_bound_of_a_timeline_takes_the_buckets_as_backward_completes_them() -> None:
    """Two buckets: the parameters 0 and 1, and the parameter 2, which comes between them."""
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (1, 1, 2)]
    timeline = Timeline(order=(1, 2, 0), seconds=(1.0, 2.0, 3.0), total=4.0)
    assert bound_of(timeline, parameters, 2, exchange=4.0) == pytest.approx(1 - 2 / 4)


def test_a_replayed_pass_delivers_the_recorded_gradients_in_their_order() -> None:
    model = ModelPass("controlnet", rank=0, channels=32, latent=8, batch=1)
    timeline, gradients = model.record()
    assert sorted(timeline.order) == list(range(len(model.parameters)))
    assert any(gradient.any() for gradient in gradients)
    arrived: list[int] = []
    for index, parameter in enumerate(model.parameters):
        parameter.register_post_accumulate_grad_hook(lambda _, index=index: arrived.append(index))  # type: ignore[no-untyped-call]
    ReplayedPass(model.parameters, timeline.scaled(0.001), gradients).run()
    assert arrived == list(timeline.order)
    replayed = [parameter.grad for parameter in model.parameters]
    assert all(grad is not None and torch.equal(grad, own) for grad, own in zip(replayed, gradients, strict=True))
