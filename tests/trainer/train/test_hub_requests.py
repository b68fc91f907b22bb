"""The ranks of a job request what is on the hub once, and wait out its faults."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from finetune_contract import environment
from finetune_contract.exit_codes import ExitCode
from testing import hub
from testing.trainer import tiny
from testing.trainer.ranks import Ranks

pytestmark = pytest.mark.trainer


def run(base: Path, data: Path, folder: Path, world_size: int, fault: hub.Fault | None = None) -> Counter[str]:
    """Run a job whose inputs are on a hub. Return its requests for them, with their numbers."""
    spec = tiny.make_spec(base, data, steps=1)
    spec = spec.model_copy(
        update={
            "model": spec.model.model_copy(update={"base": "me/base"}),
            "dataset": spec.dataset.model_copy(update={"source": "me/data"}),
        }
    )
    with hub.serve(folder / "hub") as server:
        server.publish("models", "me/base", base)
        server.publish("datasets", "me/data", data)
        extra = {**server.environment, environment.RETRY_SECONDS: "2"}
        if fault is not None:
            server.fail_always(fault, only="/api/models/me/base")
        ranks = Ranks(spec, folder / "job", world_size=world_size, extra=extra)
        codes = ranks.run()
        if fault is not None:
            assert codes == [ExitCode.NETWORK], ranks.stderr()
            assert "model.base: fetching me/base from the hub failed" in ranks.stderr()
            details = [str(report.get("detail")) for report in ranks.reports()]
            assert any("fetching me/base from the hub failed" in detail for detail in details)
        else:
            assert codes == [ExitCode.DONE] * world_size, ranks.stderr()
        return Counter(f"{each.method} {each.path}" for each in server.requests if "/me/" in each.path)


def test_two_ranks_send_the_requests_of_one(base: Path, data: Path, tmp_path: Path) -> None:
    one = run(base, data, tmp_path / "one", world_size=1)
    assert one
    assert run(base, data, tmp_path / "two", world_size=2) == one


def test_an_outage_that_lasts_ends_the_rank_with_its_own_code(base: Path, data: Path, tmp_path: Path) -> None:
    run(base, data, tmp_path, world_size=1, fault=hub.UNAVAILABLE)
