"""The topology of a machine, read from /sys, from lscpu and from the limits of a cgroup."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune_contract.cpu.cgroup import CpuLimits, read_limits
from finetune_contract.cpu.lscpu import parse_lscpu
from finetune_contract.cpu.machine import Machine, format_cpu_list, parse_cpu_list
from finetune_contract.cpu.sysfs import read_topology
from tests.cpu.machines import HOLES, HYBRID, MACHINES, ONE_SOCKET, REFERENCE, SMT_OFF, SUB_NUMA, write_sysfs


@pytest.mark.parametrize(("text", "numbers"), [("0-3,8", (0, 1, 2, 3, 8)), ("", ()), ("5\n", (5,))])
def test_lists_of_the_kernel(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_cpu_list(text) == numbers
    assert format_cpu_list(numbers) == text.strip()


@pytest.mark.parametrize("name", MACHINES)
def test_sysfs(name: str, tmp_path: Path) -> None:
    machine = MACHINES[name]
    write_sysfs(machine, tmp_path)
    assert read_topology([cpu.number for cpu in machine.cpus], root=tmp_path) == machine


def test_small_cores_by_the_list_of_the_kernel(tmp_path: Path) -> None:
    write_sysfs(SMT_OFF, tmp_path)
    (tmp_path / "devices/cpu_atom").mkdir()
    (tmp_path / "devices/cpu_atom/cpus").write_text("100-111\n")
    found = read_topology(range(112), root=tmp_path)
    assert [cpu.number for cpu in found.cpus if cpu.kind] == list(range(100, 112))


def test_without_sysfs_each_cpu_is_a_core(tmp_path: Path) -> None:
    machine = read_topology({0, 1, 2}, root=tmp_path)
    assert len(machine.cores) == 3
    assert "each one is taken for a core" in machine.assumed


def table(machine: Machine) -> str:
    """Return what `lscpu -J -e` prints."""
    rows = [
        {
            "cpu": cpu.number,
            "node": cpu.numa_node,
            "socket": cpu.socket,
            "core": cpu.core,
            "online": True,
            "maxmhz": 3800.0 if cpu.kind else 5200.0,
        }
        for cpu in machine.cpus
    ]
    return json.dumps({"cpus": rows})


def summary(**fields: object) -> str:
    """Return what `lscpu -J` prints; newer versions nest some fields."""
    entries = [{"field": name, "data": str(data)} for name, data in fields.items()]
    return json.dumps({"lscpu": [{"field": "Model name:", "data": "Xeon", "children": entries}]})


@pytest.mark.parametrize("name", MACHINES)
def test_lscpu_with_one_row_for_each_cpu(name: str) -> None:
    assert parse_lscpu(table(MACHINES[name])) == MACHINES[name]


@pytest.mark.parametrize(
    ("machine", "fields"),
    [
        (
            REFERENCE,
            {
                "On-line CPU(s) list:": "0-223",
                "Thread(s) per core:": 2,
                "Socket(s):": 2,
                "NUMA node0 CPU(s):": "0-55,112-167",
                "NUMA node1 CPU(s):": "56-111,168-223",
            },
        ),
        (
            SUB_NUMA,
            {
                "On-line CPU(s) list:": "0-223",
                "Thread(s) per core:": 2,
                "Socket(s):": 2,
                **{
                    f"NUMA node{n} CPU(s):": f"{14 * n}-{14 * n + 13},{112 + 14 * n}-{112 + 14 * n + 13}"
                    for n in range(8)
                },
            },
        ),
        (ONE_SOCKET, {"CPU(s):": 32, "Thread(s) per core:": 2, "Socket(s):": 1, "NUMA node0 CPU(s):": "0-31"}),
        (SMT_OFF, {"CPU(s):": 112, "Socket(s):": 2, "NUMA node0 CPU(s):": "0-55", "NUMA node1 CPU(s):": "56-111"}),
    ],
)
def test_lscpu_summary(machine: Machine, fields: dict[str, object]) -> None:
    found = parse_lscpu(summary(**fields))
    assert found.cpus == machine.cpus
    assert bool(found.assumed) == ("Thread(s) per core:" in fields)


def test_lscpu_of_a_virtual_machine_that_numbers_thread_by_thread() -> None:
    fields = {"CPU(s):": 8, "Thread(s) per core:": 2, "Socket(s):": 2}
    found = parse_lscpu(summary(**fields, **{"NUMA node0 CPU(s):": "0-3", "NUMA node1 CPU(s):": "4-7"}))
    assert [core.cpus for core in found.cores] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert [core.socket for core in found.cores] == [0, 0, 1, 1]


@pytest.mark.parametrize("text", ["Architecture: x86_64", "[]", "{}", '{"cpus": [{"node": 0}]}', '{"lscpu": []}'])
def test_other_files_are_refused_with_the_command_to_use(text: str) -> None:
    with pytest.raises(ValueError, match="write the output of `lscpu -J"):
        parse_lscpu(text)


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("", {}, CpuLimits(None, ())),
        # Version 2 in a container: its own cgroup is the root of the mount.
        ("0::/", {"cpu.max": "200000 100000", "cpuset.cpus.effective": "0-3"}, CpuLimits(2.0, (0, 1, 2, 3))),
        ("0::/", {"cpu.max": "max 100000"}, CpuLimits(None, ())),
        # A limit of a cgroup above counts, too.
        ("0::/pod/c", {"pod/c/cpu.max": "max 100000", "pod/cpu.max": "150000 100000"}, CpuLimits(1.5, ())),
        # Version 1: one hierarchy for each controller.
        (
            "4:cpu,cpuacct:/pod\n3:cpuset:/pod",
            {
                "cpu,cpuacct/pod/cpu.cfs_quota_us": "400000",
                "cpu,cpuacct/pod/cpu.cfs_period_us": "100000",
                "cpuset/pod/cpuset.effective_cpus": "4-7",
            },
            CpuLimits(4.0, (4, 5, 6, 7)),
        ),
        # Version 1 in a container: the path of the node does not exist there.
        (
            "4:cpu:/kubepods/x\n3:cpuset:/kubepods/x",
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000", "cpuset/cpuset.cpus": "2,5"},
            CpuLimits(None, (2, 5)),
        ),
        # The file that names the cgroups cannot be read.
        ("", {"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}, CpuLimits(1.5, ())),
    ],
)
def test_limits_of_a_cgroup(own: str, files: dict[str, str], expected: CpuLimits, tmp_path: Path) -> None:
    write(tmp_path / "fs", files)
    (tmp_path / "own").write_text(own)
    assert read_limits(tmp_path / "fs", tmp_path / "own") == expected


def test_a_machine_is_described() -> None:
    assert REFERENCE.describe() == "2 sockets, 2 NUMA nodes, 112 cores, 224 hardware threads"
    assert "2 kinds of cores" in HYBRID.describe()
    assert len(HOLES.cores) == 12
