"""A pod that does not know where rank 0 is asks the coordinator before its ranks start."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import WAIT_SECONDS, Reply
from finetune_trainer.supervisor import main
from finetune_trainer.supervisor.states import Input, State
from testing.trainer.supervisor_config import make_config
from tests.trainer.supervisor.fake_coordinator import DEADLINE_SECONDS, FakeCoordinator, StartSupervisor
from tests.trainer.supervisor.test_supervisor import HOLD, WORLD_4, fake_gpus, termination

WORLD_3 = WORLD_4 | {"attempt": 3, "nodeRank": 1, "numNodes": 2}
JOIN = HOLD | {"MASTER_ADDR": ""}
REPORT_WORLD = """
names = ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "FINETUNE_ATTEMPT"]
report(state='Training', detail=' '.join(os.environ[name] for name in names))
"""
WAIT_HERE = """
if os.environ["MASTER_ADDR"] == "here":
    report(state='Starting', detail='waits')
    signal.pause()
"""


def test_the_ranks_start_when_the_coordinator_names_rank_0(
    start: StartSupervisor, coordinator: FakeCoordinator
) -> None:
    coordinator.held.clear()
    process = start(REPORT_WORLD, **JOIN)
    asking = coordinator.wait(lambda beat: beat["joining"])
    assert coordinator.waits[0] == f"wait={WAIT_SECONDS:.0f}"
    assert (asking["attempt"], asking["waiting"]) == (3, False)
    # The plan sees what it sees of ranks that have just been started.
    assert [(rank["rank"], rank["state"]) for rank in asking["ranks"]] == [(2, "Starting"), (3, "Starting")]
    coordinator.reply = Reply.model_validate({"attempt": 3, "world": WORLD_3})
    coordinator.held.set()
    assert process.wait(DEADLINE_SECONDS) == ExitCode.DONE
    last = coordinator.beats[-1]
    assert (last["attempt"], last["nodeRank"], last["joining"]) == (3, 1, False)
    assert {rank["detail"] for rank in last["ranks"]} == {"2 4 here 7 3", "3 4 here 7 3"}
    _, err = process.communicate()
    assert "asking the coordinator for the address of rank 0" in err
    assert "attempt 3: starting the ranks as node 1 of 2" in err


def test_it_asks_until_the_coordinator_answers(start: StartSupervisor, coordinator: FakeCoordinator) -> None:
    coordinator.status = 503
    # Without a coordinator a kept pod ends after this time; this one has no work to lose.
    process = start(REPORT_WORLD, **JOIN | {"FINETUNE_HOLD_SECONDS": "0.2"})
    with coordinator.changed:
        assert coordinator.changed.wait_for(lambda: len(coordinator.beats) >= 5, DEADLINE_SECONDS)
    coordinator.reply = Reply.model_validate({"attempt": 3, "world": WORLD_3})
    coordinator.status = 200
    assert process.wait(DEADLINE_SECONDS) == ExitCode.DONE
    _, err = process.communicate()
    assert "the address of rank 0 is not known yet" in err


def test_ranks_start_again_if_rank_0_has_moved(start: StartSupervisor, coordinator: FakeCoordinator) -> None:
    coordinator.reply = Reply.model_validate({"attempt": 3, "world": WORLD_3})
    process = start(WAIT_HERE + REPORT_WORLD, **JOIN)
    meeting = coordinator.wait(lambda beat: any(rank.get("detail") == "waits" for rank in beat["ranks"]))
    assert (meeting["masterAddr"], meeting["joining"]) == ("here", False)
    coordinator.reply = Reply.model_validate({"attempt": 3, "world": WORLD_3 | {"masterAddr": "there"}})
    assert process.wait(DEADLINE_SECONDS) == ExitCode.DONE
    assert {rank["detail"] for rank in coordinator.beats[-1]["ranks"]} == {"2 4 there 7 3", "3 4 there 7 3"}


def test_a_name_that_dns_knows_replaces_a_coordinator_that_does_not_answer(
    start: StartSupervisor, coordinator: FakeCoordinator
) -> None:
    coordinator.status = 503
    process = start(REPORT_WORLD, **JOIN | {"FINETUNE_MASTER_NAME": "localhost"})
    assert process.wait(DEADLINE_SECONDS) == ExitCode.DONE
    last = coordinator.beats[-1]
    assert (last["attempt"], last.get("masterAddr")) == (3, None)
    assert {rank["detail"] for rank in last["ranks"]} == {"2 4 localhost 29500 3", "3 4 localhost 29500 3"}
    _, err = process.communicate()
    assert "the coordinator does not answer; DNS knows localhost" in err


def test_a_name_that_dns_knows_too_late_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(make_config(1, 2), master_addr="", master_name="circles-a1-n0", beat_seconds=0.001)
    supervisor = main.Supervisor(config)

    async def lose_peer(_: str) -> bool:
        supervisor._feed(Input.PEER_LOSS)
        return True

    monkeypatch.setattr(main, "_has_address", lose_peer)
    asyncio.run(supervisor._join())
    assert supervisor._state is State.PEER_LOST
    assert supervisor._config.master_addr == ""


def test_it_waits_for_the_next_attempt_when_a_peer_is_lost(
    start: StartSupervisor, coordinator: FakeCoordinator
) -> None:
    coordinator.reply = Reply(peer_lost=True)
    process = start(REPORT_WORLD, **JOIN)
    waiting = coordinator.wait(lambda beat: beat["waiting"])
    assert (waiting["ranks"], waiting["ends"], waiting["joining"]) == ([], [], False)
    coordinator.reply = Reply.model_validate({"attempt": 4, "world": WORLD_4})
    assert process.wait(DEADLINE_SECONDS) == ExitCode.DONE
    assert {rank["detail"] for rank in coordinator.beats[-1]["ranks"]} == {"0 6 here 7 4", "1 6 here 7 4"}


def test_a_notice_ends_it(start: StartSupervisor, coordinator: FakeCoordinator) -> None:
    coordinator.held.clear()
    process = start(REPORT_WORLD, **JOIN)
    coordinator.wait(lambda beat: beat["joining"])
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE_SECONDS) == ExitCode.SAVED
    assert coordinator.beats[-1]["notice"]


def test_a_fault_of_a_gpu_ends_it(start: StartSupervisor, coordinator: FakeCoordinator, tmp_path: Path) -> None:
    coordinator.held.clear()
    variables, events = fake_gpus(tmp_path)
    process = start(REPORT_WORLD, **JOIN, **variables)
    coordinator.wait(lambda beat: beat["joining"])
    events.write_text("[1, 79]\n")
    assert process.wait(DEADLINE_SECONDS) == ExitCode.DEVICE
    assert [fault["xid"] for fault in coordinator.beats[-1]["gpuFaults"]] == [79]
    [end] = termination(tmp_path).ends
    assert (end.exit_code, end.last_words) == (71, "GPU GPU-fake-1: XID 79, the GPU has fallen off the bus")


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_newer_attempt_takes_it_or_ends_it(
    start: StartSupervisor, coordinator: FakeCoordinator, is_kept: bool
) -> None:
    world = {"world": WORLD_4} if is_kept else {}
    coordinator.reply = Reply.model_validate({"attempt": 4, **world})
    process = start(REPORT_WORLD, **JOIN)
    assert process.wait(DEADLINE_SECONDS) == (ExitCode.DONE if is_kept else ExitCode.SUPERSEDED)


def test_without_a_coordinator_somebody_must_name_rank_0(start: StartSupervisor) -> None:
    process = start(REPORT_WORLD, **JOIN | {"FINETUNE_COORDINATOR_URL": ""})
    assert process.wait(DEADLINE_SECONDS) == ExitCode.CONFIG
    _, err = process.communicate()
    assert "neither MASTER_ADDR nor FINETUNE_COORDINATOR_URL is set" in err
