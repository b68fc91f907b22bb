"""The supervisor with real processes: fake ranks that send reports, and an HTTP server that records heartbeats."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune_contract.cpu.placement import PlacementRequest, place_ranks
from finetune_contract.cpu.sysfs import read_machine
from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import RankState, Reply, Termination
from finetune_trainer.supervisor.ranks import send_signal
from testing.controlplane.process import wait_for
from tests.trainer.supervisor.fake_coordinator import DEADLINE_SECONDS, FakeCoordinator, StartSupervisor


def termination(tmp_path: Path) -> Termination:
    return Termination.model_validate_json((tmp_path / "termination-log").read_text())


def test_ranks_get_torch_variables_and_their_share_of_the_cores(start: StartSupervisor) -> None:
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"]
    process = start(f"print(json.dumps([[os.environ[n] for n in {names}], sorted(os.sched_getaffinity(0))]))")
    out, _ = process.communicate(timeout=DEADLINE_SECONDS)
    ranks = sorted(json.loads(line.split("] ", 1)[1]) for line in out.splitlines())
    places = place_ranks(read_machine(), PlacementRequest(2)).ranks
    assert [variables for variables, _ in ranks] == [
        [str(2 + rank), "4", str(rank), "2", str(place.num_threads)] for rank, place in enumerate(places)
    ]
    assert [cores for _, cores in ranks] == [sorted(place.compute or os.sched_getaffinity(0)) for place in places]
    assert process.returncode == ExitCode.DONE


def test_heartbeats_contain_the_reports_and_the_token(start: StartSupervisor, coordinator: FakeCoordinator) -> None:
    process = start("report(state='Training', step=7, loss=0.5, warnings=['one']); report(state='Saving', step=8)")
    process.communicate(timeout=DEADLINE_SECONDS)
    beat = coordinator.beats[-1]
    assert {rank["state"] for rank in beat["ranks"]} == {RankState.DONE}
    assert [rank["step"] for rank in beat["ranks"]] == [8, 8]
    assert beat["ranks"][0]["loss"] == 0.5, "a field that a later report omits keeps its value"
    assert beat["ranks"][0]["warnings"] == ["one"]
    assert [b["sequence"] for b in coordinator.beats] == list(range(1, len(coordinator.beats) + 1))
    assert set(coordinator.tokens) == {"Bearer sesame"}


def test_a_change_of_state_is_sent_at_once(start: StartSupervisor, coordinator: FakeCoordinator) -> None:
    start("report(state='Loading'); report(state='Training', step=1); signal.pause()", FINETUNE_BEAT_SECONDS="3600")
    coordinator.wait(lambda beat: all(rank["state"] == "Training" for rank in beat["ranks"]))


def test_preemption_notice_reaches_all_ranks_and_waits_for_their_save(
    start: StartSupervisor, coordinator: FakeCoordinator, tmp_path: Path
) -> None:
    process = start(
        """
        def save(*_):
            time.sleep(1)  # longer than all timeouts except the grace period
            sys.exit(75)
        signal.signal(signal.SIGTERM, save)
        report(state='Training', step=5)
        while True: signal.pause()
        """
    )
    coordinator.wait(lambda beat: all(rank["state"] == "Training" for rank in beat["ranks"]))
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE_SECONDS) == ExitCode.SAVED
    message = termination(tmp_path)
    assert message.notice
    assert message.step == 5
    assert {end.exit_code for end in message.ends} == {ExitCode.SAVED}
    assert coordinator.wait(lambda beat: beat["notice"])


def test_the_first_failed_rank_is_the_cause_and_its_output_is_kept(start: StartSupervisor, tmp_path: Path) -> None:
    process = start(
        """
        if rank == 3:
            print("CUDA out of memory", file=sys.stderr); sys.exit(1)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(76))
        while True: signal.pause()
        """
    )
    assert process.wait(DEADLINE_SECONDS) == 1
    message = termination(tmp_path)
    assert message.ends[0].rank == 3
    assert message.ends[0].exit_code == 1
    assert "CUDA out of memory" in message.ends[0].last_words


def test_a_killed_rank_ends_the_pod_with_137_if_its_peer_hangs(
    start: StartSupervisor, coordinator: FakeCoordinator
) -> None:
    process = start(
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        report(state='Training', step=1, detail=str(os.getpid()))
        while True: signal.pause()
        """,
        FINETUNE_BEAT_SECONDS="0.05",
    )
    beat = coordinator.wait(lambda beat: all(rank.get("detail") for rank in beat["ranks"]))
    os.kill(int(beat["ranks"][0]["detail"]), signal.SIGKILL)
    assert process.wait(DEADLINE_SECONDS) == 128 + signal.SIGKILL


def test_ranks_are_killed_with_their_supervisor(start: StartSupervisor, coordinator: FakeCoordinator) -> None:
    process = start("report(state='Training', detail=str(os.getpid())); signal.pause()", FINETUNE_BEAT_SECONDS="0.05")
    beat = coordinator.wait(lambda beat: all(rank.get("detail") for rank in beat["ranks"]))
    descriptors = [os.pidfd_open(int(rank["detail"])) for rank in beat["ranks"]]
    process.kill()
    for descriptor in descriptors:
        ready, _, _ = select.select([descriptor], [], [], DEADLINE_SECONDS)
        assert ready, "a rank survived its supervisor"
        os.close(descriptor)


def test_training_continues_without_a_coordinator(start: StartSupervisor) -> None:
    process = start("report(state='Training', step=1)", FINETUNE_COORDINATOR_URL="http://127.0.0.1:9")
    _, err = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == ExitCode.DONE
    assert err.count("training continues") == 1


def test_a_save_request_without_hold_is_a_preemption_notice(
    start: StartSupervisor, coordinator: FakeCoordinator
) -> None:
    process = start("signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); report(state='Training'); signal.pause()")
    coordinator.wait(lambda beat: all(rank["state"] == "Training" for rank in beat["ranks"]))
    coordinator.reply = Reply.model_validate({"order": "SaveAndStop"})
    assert process.wait(DEADLINE_SECONDS) == ExitCode.SAVED


def test_stacks_of_hanging_ranks_are_stored(
    start: StartSupervisor, coordinator: FakeCoordinator, tmp_path: Path
) -> None:
    process = start(
        """
        import faulthandler, threading
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        lock = threading.Lock()
        def take_it_twice():
            with lock, lock: pass
        def report_the_deadlock():
            while sys._current_frames()[threading.main_thread().ident].f_code.co_name != "take_it_twice": pass
            report(state='Training', step=7, detail=str(os.getpid()))
        if os.environ["FINETUNE_ATTEMPT"] == "3":
            if rank == 3:
                report(state='Training', step=7, detail=str(os.getpid()))
                os.kill(os.getpid(), signal.SIGSTOP)
            threading.Thread(target=report_the_deadlock, daemon=True).start()
            take_it_twice()
        """,
        FINETUNE_CHECKPOINT_DIR=str(tmp_path / "job"),
        **HOLD,
    )
    beat = coordinator.wait(lambda beat: all(rank["state"] == "Training" for rank in beat["ranks"]))
    pid = int(beat["ranks"][1]["detail"])
    wait_for("rank 3 to stop", lambda: ") T " in Path(f"/proc/{pid}/stat").read_text())
    # The new world arrives in the same reply: the stacks are written before the ranks end.
    coordinator.reply = Reply.model_validate({"attempt": 4, "world": WORLD_4, "stacks": True})
    folder = tmp_path / "job" / "hangs" / "attempt-3"
    wait_for("the stacks", lambda: all((folder / f"rank-{rank}.txt").exists() for rank in (2, 3)))
    # The ranks of the other pod have not stored theirs: their collectives would fail if these ranks ended.
    later = coordinator.beats[-1]["sequence"] + 2
    beat = coordinator.wait(lambda beat: beat["sequence"] >= later)
    assert (beat["attempt"], [rank["state"] for rank in beat["ranks"]]) == (3, ["Training", "Training"])
    for rank in (0, 1):
        (folder / f"rank-{rank}.txt").write_text("")
    assert process.wait(DEADLINE_SECONDS) == ExitCode.DONE
    deadlocked, stopped = (folder / "rank-2.txt").read_text(), (folder / "rank-3.txt").read_text()
    assert "training at step 7" in deadlocked
    assert "in take_it_twice" in deadlocked
    assert "process state: T (stopped)" in stopped


LATE = """
        class Late:
            def __del__(self):
                # Python has removed its signal handlers at this point.
                report(state=LAST, detail="late")
                signal.pause()
        signal.signal(signal.SIGTERM, lambda *_: None)
        late = Late()
"""


@pytest.mark.parametrize(("state", "code"), [("Saved", ExitCode.SAVED), ("Done", ExitCode.DONE), ("Training", 143)])
def test_save_request_during_the_exit_of_a_rank(
    start: StartSupervisor, coordinator: FakeCoordinator, state: str, code: int
) -> None:
    process = start(LATE.replace("LAST", repr(state)))
    coordinator.wait(lambda beat: all(rank.get("detail") == "late" for rank in beat["ranks"]))
    coordinator.reply = Reply.model_validate({"order": "SaveAndStop"})
    assert process.wait(DEADLINE_SECONDS) == code


def test_save_request_before_a_rank_handles_signals(start: StartSupervisor, coordinator: FakeCoordinator) -> None:
    process = start("report(state='Starting', detail='early'); signal.pause()", FINETUNE_BEAT_SECONDS="0.05")
    coordinator.wait(lambda beat: all(rank.get("detail") == "early" for rank in beat["ranks"]))
    coordinator.reply = Reply.model_validate({"order": "SaveAndStop"})
    assert process.wait(DEADLINE_SECONDS) == ExitCode.SAVED


def test_a_superseded_supervisor_stops(start: StartSupervisor, coordinator: FakeCoordinator) -> None:
    coordinator.reply = Reply(attempt=4)
    process = start("signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); signal.pause()")
    assert process.wait(DEADLINE_SECONDS) == ExitCode.SUPERSEDED


WORLD_4 = {"attempt": 4, "nodeRank": 0, "numNodes": 3, "masterAddr": "here", "masterPort": 7}
HOLD = {"FINETUNE_HOLD_SECONDS": "60", "FINETUNE_BEAT_SECONDS": "0.05"}


def test_ranks_restart_in_the_new_world_after_a_lost_peer(start: StartSupervisor, coordinator: FakeCoordinator) -> None:
    process = start(
        """
        if os.environ["FINETUNE_ATTEMPT"] == "3":
            sys.exit(76)
        names = ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "FINETUNE_NUM_NODES"]
        report(state='Training', detail=' '.join(os.environ[name] for name in names))
        """,
        **HOLD,
    )
    waiting = coordinator.wait(lambda beat: beat["waiting"])
    # The other rank may have received SIGTERM before its first line.
    assert waiting["ends"][0]["exitCode"] == ExitCode.FABRIC
    coordinator.reply = Reply.model_validate({"attempt": 4, "world": WORLD_4})
    assert process.wait(DEADLINE_SECONDS) == ExitCode.DONE
    last = coordinator.beats[-1]
    assert (last["attempt"], last["nodeRank"], last["waiting"]) == (4, 0, False)
    assert {rank["detail"] for rank in last["ranks"]} == {"0 6 here 7 3", "1 6 here 7 3"}


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores, of which one is taken away")
def test_a_machine_with_too_few_cores_for_the_new_world_ends_the_pod_with_a_message(
    start: StartSupervisor, coordinator: FakeCoordinator, tmp_path: Path
) -> None:
    document = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**document, "cpu": {"coresForCommunication": 1}}))
    process = start("sys.exit(76)", ranks=1, **HOLD)
    coordinator.wait(lambda beat: beat["waiting"])
    os.sched_setaffinity(process.pid, {min(os.sched_getaffinity(0))})
    coordinator.reply = Reply.model_validate({"attempt": 4, "world": WORLD_4})
    _, err = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == ExitCode.CONFIG
    message = "topology.cpu.coresForCommunication: 1 leaves no core"
    assert message in err
    assert "Traceback" not in err
    ended = termination(tmp_path)
    assert (ended.attempt, ended.exit_code) == (4, ExitCode.CONFIG)
    assert message in ended.ends[0].last_words
    assert coordinator.beats[-1]["ends"][0]["exitCode"] == ExitCode.CONFIG


def test_hanging_ranks_are_killed_for_a_new_world(start: StartSupervisor, coordinator: FakeCoordinator) -> None:
    process = start(
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        report(state='Training')
        while os.environ["FINETUNE_ATTEMPT"] == "3": signal.pause()
        """,
        **HOLD,
    )
    coordinator.wait(lambda beat: all(rank["state"] == "Training" for rank in beat["ranks"]))
    coordinator.reply = Reply.model_validate({"attempt": 4, "world": WORLD_4})
    assert process.wait(DEADLINE_SECONDS) == ExitCode.DONE


def test_hanging_ranks_are_killed_when_the_coordinator_reports_a_lost_peer(
    start: StartSupervisor, coordinator: FakeCoordinator
) -> None:
    process = start(
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        report(state='Training')
        while os.environ["FINETUNE_ATTEMPT"] == "3": signal.pause()
        """,
        **HOLD,
    )
    coordinator.wait(lambda beat: all(rank["state"] == "Training" for rank in beat["ranks"]))
    coordinator.reply = Reply(attempt=3, peer_lost=True)
    waiting = coordinator.wait(lambda beat: beat["waiting"])
    assert {end["exitCode"] for end in waiting["ends"]} == {ExitCode.FABRIC}
    coordinator.reply = Reply.model_validate({"attempt": 4, "world": WORLD_4})
    assert process.wait(DEADLINE_SECONDS) == ExitCode.DONE


def test_a_waiting_supervisor_exits_on_preemption_notice(
    start: StartSupervisor, coordinator: FakeCoordinator, tmp_path: Path
) -> None:
    process = start("sys.exit(76)", **HOLD)
    coordinator.wait(lambda beat: beat["waiting"])
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE_SECONDS) == ExitCode.FABRIC
    assert termination(tmp_path).notice


def test_no_wait_for_a_world_if_the_coordinator_never_answered(start: StartSupervisor) -> None:
    process = start("sys.exit(76)", FINETUNE_COORDINATOR_URL="http://127.0.0.1:9", **HOLD)
    assert process.wait(DEADLINE_SECONDS) == ExitCode.FABRIC


def test_a_failed_rank_ends_the_pod_without_waiting(start: StartSupervisor, coordinator: FakeCoordinator) -> None:
    process = start("sys.exit(1)", **HOLD)
    assert process.wait(DEADLINE_SECONDS) == 1
    assert [beat["waiting"] for beat in coordinator.beats] == [False] * len(coordinator.beats)
    assert coordinator.beats


def test_after_a_save_request_the_pod_waits_for_a_new_world(
    start: StartSupervisor, coordinator: FakeCoordinator
) -> None:
    process = start(
        """
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        report(state='Training')
        while os.environ["FINETUNE_ATTEMPT"] == "3": signal.pause()
        """,
        **HOLD,
    )
    coordinator.wait(lambda beat: all(rank["state"] == "Training" for rank in beat["ranks"]))
    coordinator.reply = Reply.model_validate({"order": "SaveAndStop"})
    saved = coordinator.wait(lambda beat: beat["waiting"])
    assert {end["exitCode"] for end in saved["ends"]} == {ExitCode.SAVED}
    assert not saved["notice"]
    coordinator.reply = Reply.model_validate({"attempt": 4, "world": WORLD_4})
    assert process.wait(DEADLINE_SECONDS) == ExitCode.DONE


def test_progress_bars_and_invalid_reports_are_tolerated(start: StartSupervisor) -> None:
    process = start(
        "sys.stderr.write('1%\\r2%\\r' + 'x' * 300000); os.write(int(os.environ['FINETUNE_REPORT_FD']), b'?\\n')"
    )
    _, err = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == ExitCode.DONE
    assert "sent an invalid report" in err


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FINETUNE_ATTEMPT", "zero", "FINETUNE_ATTEMPT='zero' must be an integer of at least 1"),
        ("FINETUNE_POD_NAME", "", "FINETUNE_POD_NAME is not set"),
        ("FINETUNE_RUN_SPEC", "/nowhere/run.json", "cannot read /nowhere/run.json"),
        ("FINETUNE_BEAT_SECONDS", "-1", "must be a number of seconds"),
        ("FINETUNE_BACKEND", "ccl", "topology.cpu.backend: ccl needs the package oneccl_bindings_for_pytorch"),
    ],
)
def test_an_invalid_environment_variable_is_named(start: StartSupervisor, name: str, value: str, message: str) -> None:
    process = start("", **{name: value})
    _, err = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == ExitCode.CONFIG
    assert message in err


def test_a_signal_to_an_ended_process_keeps_its_exit_code() -> None:
    ended: Any = subprocess.Popen([sys.executable, "-c", "import sys; sys.exit(76)"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    send_signal(ended, signal.SIGTERM)
    # asyncio's watcher collects the exit code in its own thread.
    _, status = os.waitpid(ended.pid, 0)
    ended.returncode = os.waitstatus_to_exitcode(status)
    assert ended.returncode == ExitCode.FABRIC


def fake_gpus(folder: Path) -> tuple[dict[str, str], Path]:
    """Return the environment of a supervisor with a stand-in for NVML, and the file from which it reads events.

    The stand-in is a module pynvml: this machine has no GPU.
    """
    modules, events = folder / "modules", folder / "events"
    modules.mkdir()
    (modules / "pynvml.py").write_text("from testing.trainer.nvml_stand_in import *\n")
    return {"PYTHONPATH": os.pathsep.join([str(modules), *sys.path]), "FAKE_NVML_EVENTS": str(events)}, events


def test_fault_of_a_gpu_ends_the_ranks_and_is_reported(
    start: StartSupervisor, coordinator: FakeCoordinator, tmp_path: Path
) -> None:
    variables, events = fake_gpus(tmp_path)
    process = start(
        """
        signal.signal(signal.SIGTERM, lambda *_: os._exit(70))
        report(state='Training', step=5)
        while True: signal.pause()
        """,
        **variables,
    )
    coordinator.wait(lambda beat: all(rank["state"] == "Training" for rank in beat["ranks"]))
    events.write_text("[0, 31]\n[1, 79]\n")
    assert process.wait(DEADLINE_SECONDS) == ExitCode.SOFTWARE
    expected = {"uuid": "GPU-fake-1", "xid": 79, "message": "GPU GPU-fake-1: XID 79, the GPU has fallen off the bus"}
    assert coordinator.beats[-1]["gpuFaults"] == [expected]
    assert [fault.model_dump(exclude_none=True) for fault in termination(tmp_path).gpu_faults] == [expected]
