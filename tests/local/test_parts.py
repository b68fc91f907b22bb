"""Small parts of the local cluster: cores, devices, faults, files, locks, ports, observed pods."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_contract.heartbeat import RankReport, RankState
from finetune_operator.api import labels
from finetune_operator.cluster.local.faults import FaultKind, PlannedFault, parse_fault
from finetune_operator.cluster.local.files import BrokenFileError, read_json, read_or_recover, write_json
from finetune_operator.cluster.local.home import CACHE_CLAIM, Home, default_home
from finetune_operator.cluster.local.kubelet.cores import choose_cores, parse_cpu, wanted_cores
from finetune_operator.cluster.local.kubelet.devices import choose_gpus, find_gpus, wanted_gpus
from finetune_operator.cluster.local.lock import LockedError, hold, holder
from finetune_operator.cluster.local.ports import JobPorts
from finetune_operator.cluster.observe import observe_pod
from finetune_operator.cluster.protocol import JobKey
from finetune_operator.plan.model.types import PodPhase

CORES = st.frozensets(st.integers(0, 15))


@given(available=CORES, siblings=st.lists(CORES), others=st.lists(CORES), wanted=st.integers(1, 16))
def test_siblings_never_share_a_core(
    available: frozenset[int], siblings: list[frozenset[int]], others: list[frozenset[int]], wanted: int
) -> None:
    taken = frozenset[int]().union(*siblings)
    chosen = choose_cores(sorted(available), siblings, others, wanted)
    if chosen is None:
        assert len(available - taken) < wanted
    else:
        assert len(chosen) == wanted
        assert chosen <= available - taken
        load = {core: sum(core in cores for cores in others) for core in available}
        spared = available - taken - chosen
        assert all(load[core] <= load[other] for core in chosen for other in spared)


def test_the_hardware_threads_of_a_core_belong_to_one_pod() -> None:
    """On a machine whose cores have the threads 0 and 2, 1 and 3."""
    first = choose_cores((0, 2, 1, 3), [], [], 2)
    assert first == frozenset({0, 2})
    assert choose_cores((0, 2, 1, 3), [first], [], 2) == frozenset({1, 3})


@pytest.mark.parametrize(
    ("resources", "num_pods", "cores"),
    [
        ({}, 2, 4),
        ({}, 3, 2),
        ({}, 100, 1),
        ({"requests": {"cpu": "2"}}, 2, 2),
        ({"requests": {"cpu": "64"}}, 2, 4),
        ({"limits": {"cpu": "1500m"}}, 2, 2),
        ({"requests": {"cpu": "100m"}}, 2, 1),
    ],
)
def test_share_of_eight_cores(resources: dict[str, dict[str, str]], num_pods: int, cores: int) -> None:
    assert wanted_cores({"resources": resources}, num_pods, 8) == cores


@pytest.mark.parametrize(("quantity", "cores"), [("2", 2), ("2.5", 3), ("100m", 1), (4, 4), ("0", 0)])
def test_cpu_quantities_are_rounded_up(quantity: str | int, cores: int) -> None:
    assert parse_cpu(quantity) == cores


def test_gpus_are_found_and_chosen(tmp_path: Path) -> None:
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / name).mkdir()
    assert find_gpus({}, tmp_path) == ("0", "1")
    assert find_gpus({"CUDA_VISIBLE_DEVICES": "3, 5"}, tmp_path) == ("3", "5")
    assert find_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == ()
    assert find_gpus({}, tmp_path / "none") == ()
    assert wanted_gpus({"resources": {"limits": {"nvidia.com/gpu": "2"}}}) == 2
    assert choose_gpus(("0", "1", "2"), [("1",)], 2) == ("0", "2")
    assert choose_gpus(("0", "1"), [("1",)], 2) is None


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("rank=1,at-step=40", PlannedFault(FaultKind.KILL, 1, at_step=40)),
        (" at-step=0 , rank=0 ", PlannedFault(FaultKind.KILL, 0, at_step=0)),
        ("rank=3,at-state=saving", PlannedFault(FaultKind.KILL, 3, at_state=RankState.SAVING)),
    ],
)
def test_faults_are_parsed(text: str, fault: PlannedFault) -> None:
    assert parse_fault(FaultKind.KILL, text) == fault


def test_a_fault_is_due_at_its_step_or_state() -> None:
    reports = [RankReport(rank=0, state=RankState.SAVING, step=5), RankReport(rank=1, state=RankState.TRAINING)]
    assert PlannedFault(FaultKind.KILL, 1, at_step=5).is_due(reports)
    assert not PlannedFault(FaultKind.KILL, 1, at_step=6).is_due(reports)
    assert PlannedFault(FaultKind.KILL, 0, at_state=RankState.SAVING).is_due(reports)
    assert not PlannedFault(FaultKind.KILL, 1, at_state=RankState.SAVING).is_due(reports)
    assert not PlannedFault(FaultKind.KILL, 1, at_step=0).is_due([])


def test_a_write_is_atomic_and_keeps_the_previous_version(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.json"
    for number in range(3):
        write_json(path, {"number": number}, keep_previous=True)
    assert read_json(path, dict) == {"number": 2}
    assert json.loads(path.with_name("x.json.previous").read_text()) == {"number": 1}
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["x.json", "x.json.previous"]


def test_a_broken_file_is_renamed_and_the_previous_version_is_used(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    warnings: list[str] = []
    assert read_or_recover(path, dict, warnings.append) is None
    assert warnings == []
    write_json(path, {"number": 1}, keep_previous=True)
    write_json(path, {"number": 2}, keep_previous=True)
    path.write_text("{")
    with pytest.raises(BrokenFileError, match=r"x\.json cannot be read"):
        read_json(path, dict)
    assert read_or_recover(path, dict, warnings.append) == {"number": 1}
    assert len(warnings) == 2
    assert (tmp_path / "x.json.broken-1").read_text() == "{"
    path.write_text("")
    assert read_or_recover(path, dict, warnings.append) == {"number": 1}
    assert (tmp_path / "x.json.broken-2").exists()


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    path = tmp_path / "job" / "lock"
    with hold(path):
        process = holder(path)
        assert process is not None
        assert process.pid == os.getpid()
        with pytest.raises(LockedError, match=f"held by process {os.getpid()}"), hold(path):
            pass
    assert holder(path) is None


def test_the_kernel_releases_the_lock_of_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = (
        "import sys, pathlib, signal\nfrom finetune_operator.cluster.local.lock import hold\n"
        f"with hold(pathlib.Path({str(path)!r})):\n    print('held', flush=True)\n    signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        other = holder(path)
        assert other is not None
        assert other.pid == process.pid
        with pytest.raises(LockedError), hold(path):
            pass
        process.kill()
        process.wait()
    assert holder(path) is None
    with hold(path):
        pass


def test_a_lock_whose_file_was_removed_can_be_taken_again(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with hold(path):
        path.unlink()
        with hold(path):
            assert path.exists()


def test_ports_are_kept_for_the_next_runner(tmp_path: Path) -> None:
    warnings: list[str] = []
    path = tmp_path / "endpoint.json"
    first = JobPorts(path, warnings.append)
    first.keep_coordinator_port(17_000)
    port = first.master_port(2)
    again = JobPorts(path, warnings.append)
    assert again.coordinator_port == 17_000
    assert again.master_port(2) == port
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
        assert again.master_port(3) != port
    path.write_text('{"coordinator": "x"}')
    assert JobPorts(path, warnings.append).coordinator_port == 0
    assert len(warnings) == 1


def test_layout_of_the_state_folder() -> None:
    home = Home(Path("/home/me/state"))
    assert home.claim(CACHE_CLAIM) == Path("/home/me/state/cache")
    assert home.claim("data") == Path("/home/me/state/volumes/data")
    assert home.job(JobKey("default", "x")).job == Path("/home/me/state/jobs/default/x/job.json")
    assert default_home({"FINETUNE_HOME": "/a"}) == Path("/a")
    assert default_home({"XDG_STATE_HOME": "/b"}) == Path("/b/finetune")
    assert default_home({}) == Path("~/.local/state/finetune").expanduser()


def pod(**status: object) -> dict[str, object]:
    return {
        "metadata": {
            "name": "x-a2-n1",
            "uid": "u",
            "creationTimestamp": "2026-01-01T12:00:00Z",
            "labels": {labels.ATTEMPT: "2", labels.NODE_RANK: "1"},
        },
        "spec": {
            "nodeName": "node-7",
            "containers": [{"name": "trainer", "env": [{"name": "FINETUNE_PROCESSES_PER_NODE", "value": "4"}]}],
        },
        "status": status,
    }


def test_pods_are_observed() -> None:
    seen = observe_pod(pod(phase="Running", containerStatuses=[{"name": "trainer", "ready": True, "state": {}}]))
    assert seen is not None
    assert (seen.attempt, seen.node_rank, seen.phase, seen.ready, seen.node) == (2, 1, PodPhase.RUNNING, True, "node-7")
    kept = "0/3 nodes are available: 3 Insufficient cpu."
    for more in ("", " preemption: not helpful.", " no new claims to deallocate, preemption: 0/3 nodes are available."):
        unscheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": kept + more}
        waiting = observe_pod(pod(conditions=[unscheduled]))
        assert waiting is not None
        # Only the part of the scheduler's message that names what is missing is kept.
        assert (waiting.phase, waiting.waiting) == (PodPhase.PENDING, f"Unschedulable: {kept}")
    unlabelled = pod()
    unlabelled["metadata"]["labels"] = {}  # type: ignore[index]
    assert observe_pod(unlabelled) is None


def test_the_end_of_the_log_replaces_the_termination_message() -> None:
    state = {"terminated": {"exitCode": 137, "reason": "OOMKilled", "message": "line 1\nline 2"}}
    seen = observe_pod(pod(phase="Failed", containerStatuses=[{"name": "trainer", "state": state}]))
    assert seen is not None
    assert (seen.exit_code, seen.reason) == (137, "OOMKilled")
    assert seen.termination is not None
    assert (seen.termination.ends[0].rank, seen.termination.ends[0].last_words) == (4, "line 1\nline 2")


def test_a_termination_message_with_an_absurd_number_counts_as_text() -> None:
    """The container writes it; a step that no status can store must not get there."""
    message = f'{{"attempt": 1, "exitCode": 1, "step": {10**19}}}'
    state = {"terminated": {"exitCode": 1, "message": message}}
    seen = observe_pod(pod(phase="Failed", containerStatuses=[{"name": "trainer", "state": state}]))
    assert seen is not None
    assert seen.termination is not None
    assert (seen.termination.step, seen.termination.ends[0].last_words) == (None, message)
