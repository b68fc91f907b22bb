"""The setup of the ranks on their node: what is logged, what is refused, and what reaches the process of a rank."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from finetune_contract import environment
from finetune_contract.cpu.backend import CCL_BINDING
from finetune_contract.cpu.machine import Machine
from finetune_contract.cpu.spec import Allocator, CpuSpec
from finetune_contract.spec import SwitchMode
from finetune_trainer.distributed.cpus import communication_cpus, use_helper_cpus
from finetune_trainer.supervisor import node_setup
from finetune_trainer.supervisor.config import BadEnvironmentError, Config
from finetune_trainer.supervisor.node_setup import SetupReader
from finetune_trainer.supervisor.numa import memory_binder, why_not_bindable
from testing.trainer.supervisor_config import make_config
from tests.cpu.machines import ONE_SOCKET, REFERENCE


def config(cpu: CpuSpec | None = None, ranks: int = 4, nodes: int = 1) -> Config:
    return replace(make_config(num_nodes=nodes), processes_per_node=ranks, cpu=cpu or CpuSpec())


def setup_of(config: Config, machine: Machine, env: dict[str, str]) -> node_setup.NodeSetup:
    return SetupReader(config, env, lambda: machine).for_world(config)


def test_the_setup_is_logged_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_setup, "why_not_bindable", lambda: "Operation not permitted")
    reader = SetupReader(config(), {environment.BACKEND: "auto"}, lambda: REFERENCE)
    setup = reader.for_world(config())
    lines = capsys.readouterr().err.splitlines()
    text = "\n".join(lines)
    assert "machine: 2 sockets, 2 NUMA nodes, 112 cores, 224 hardware threads" in text
    assert "placement: 2 ranks per NUMA node" in text
    assert "rank 3: 28 threads on CPUs 84-111" in text
    assert "memory is not bound, because set_mempolicy is refused (Operation not permitted)" in text
    assert f"backend gloo: auto, and the package {CCL_BINDING} is not installed" in text
    assert "allocator glibc" in text
    assert [place.memory for place in setup.placement.ranks] == [()] * 4
    assert len(lines) == len(set(lines))


def test_variables_of_a_rank() -> None:
    setup = setup_of(config(CpuSpec(cores_for_communication=2)), REFERENCE, {environment.BACKEND: "auto"})
    values = setup.rank_variables(1, {"MKL_NUM_THREADS": "5"})
    assert values["OMP_NUM_THREADS"] == "26"
    assert values["MKL_NUM_THREADS"] == "5"
    assert values[environment.BACKEND] == "gloo"
    assert values[environment.COMMUNICATION_CPUS] == "54-55"
    assert values[environment.HELPER_CPUS] == "28-53,140-165"
    # Without own cores for communication, its threads use the other hardware threads of the compute cores.
    plain = setup_of(config(), REFERENCE, {environment.BACKEND: "gloo"}).rank_variables(0, {})
    assert plain[environment.COMMUNICATION_CPUS] == "0-27,112-139"


def test_the_fork_server_loads_the_libraries_of_all_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A library cannot be preloaded into a rank that is forked from a process which runs without it."""
    library = tmp_path / "libjemalloc.so.2"
    library.write_bytes(b"")
    monkeypatch.setattr("finetune_contract.cpu.libraries.library_folders", lambda: [tmp_path])
    setup = setup_of(config(CpuSpec(allocator=Allocator.JEMALLOC)), REFERENCE, {environment.BACKEND: "gloo"})
    env = {environment.FORK_SERVER: "@shared", "LD_PRELOAD": "/opt/own.so"}
    values = setup.server_variables(env)
    assert values["LD_PRELOAD"] == f"{library}:/opt/own.so"
    # A server that several pods share was started without it.
    assert values[environment.FORK_SERVER] == ""
    assert setup.rank_variables(2, env)["LD_PRELOAD"] == values["LD_PRELOAD"]


@pytest.mark.parametrize(
    ("cpu", "backend", "message"),
    [
        (CpuSpec(), "ccl", "topology.cpu.backend: ccl needs the package"),
        (CpuSpec(ipex=SwitchMode.ON), "gloo", "topology.cpu.ipex: on needs the package"),
        (CpuSpec(allocator=Allocator.TCMALLOC), "gloo", "topology.cpu.allocator: tcmalloc is not installed"),
        (CpuSpec(cores_for_communication=4), "gloo", "topology.cpu.coresForCommunication: 4 leaves no core"),
    ],
)
def test_missing_support_is_an_error_before_any_rank_starts(
    cpu: CpuSpec, backend: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_contract.cpu.libraries.library_folders", list)
    with pytest.raises(BadEnvironmentError, match="^" + message.replace(".", r"\.")):
        SetupReader(config(cpu), {environment.BACKEND: backend}, lambda: ONE_SOCKET)


def test_a_gpu_pod_needs_no_software_for_cpus() -> None:
    setup = setup_of(config(CpuSpec(ipex=SwitchMode.ON)), REFERENCE, {environment.BACKEND: "nccl"})
    assert setup.backend == "nccl"
    assert len(setup.placement.ranks[0].compute) == 56


def test_the_memory_policy_reaches_the_kernel() -> None:
    """The policy of a real process, as the kernel reports it."""
    if reason := why_not_bindable():
        pytest.skip(f"set_mempolicy is refused here: {reason}")
    code = (
        "from finetune_trainer.supervisor.numa import memory_binder\n"
        "assert memory_binder(())() == 0\n"
        "assert memory_binder((0,))() == 0\n"
        "print(open('/proc/self/numa_maps').readline().split()[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in {"prefer:0", "prefer=static:0", "prefer (many):0"}
    # A node that does not exist is refused, and the rank continues with the kernel's default.
    assert memory_binder((1000,))() == -1


def test_threads_start_on_their_cpus() -> None:
    before = os.sched_getaffinity(0)
    one = min(before)
    seen: list[set[int]] = []

    def note() -> None:
        seen.append(os.sched_getaffinity(0))

    with communication_cpus({environment.COMMUNICATION_CPUS: str(one)}):
        thread = threading.Thread(target=note)
        thread.start()
    thread.join()
    assert os.sched_getaffinity(0) == before

    def helper() -> None:
        use_helper_cpus({environment.HELPER_CPUS: str(one)})
        note()

    thread = threading.Thread(target=helper)
    thread.start()
    thread.join()
    assert seen == [{one}, {one}]
    with communication_cpus({environment.COMMUNICATION_CPUS: "99999"}):
        assert os.sched_getaffinity(0) == before
