"""Descriptions of machines for the tests of placement, as objects and as the files of /sys."""

from __future__ import annotations

from pathlib import Path

from finetune_contract.cpu.machine import LogicalCpu, Machine, format_cpu_list


def make_machine(sockets: int = 1, nodes: int = 1, cores: int = 4, threads: int = 1) -> Machine:
    """Return a machine with the numbering of bare metal: the first threads of all cores, then the second ones.

    Args:
        sockets: number of sockets.
        nodes: NUMA nodes of each socket.
        cores: cores of each NUMA node.
        threads: hardware threads of each core.
    """
    num_cores = sockets * nodes * cores
    return Machine(
        tuple(
            LogicalCpu(thread * num_cores + core, core, core // (nodes * cores), core // cores)
            for thread in range(threads)
            for core in range(num_cores)
        )
    )


REFERENCE = make_machine(sockets=2, nodes=1, cores=56, threads=2)
"""The machine of the reference case: 224 hardware threads."""
ONE_SOCKET = make_machine(cores=16, threads=2)
SUB_NUMA = make_machine(sockets=2, nodes=4, cores=14, threads=2)
"""The reference machine with sub-NUMA clustering: eight NUMA nodes."""
SMT_OFF = make_machine(sockets=2, cores=56)
HOLES = REFERENCE.restricted_to([*range(8), *range(56, 60), *range(112, 120), *range(168, 172)])
"""The reference machine with a cpuset: eight cores of the first socket, four of the second."""
ONE_CORE = make_machine(cores=1, threads=2)
HYBRID = Machine(
    tuple(
        [LogicalCpu(number, core=number // 2 * 2, kind=0) for number in range(12)]
        + [LogicalCpu(number, core=number, kind=1) for number in range(12, 20)]
    )
)
"""Six large cores with two threads each, and eight small ones."""
MACHINES = {
    "2 x 56 x 2": REFERENCE,
    "one socket": ONE_SOCKET,
    "sub-NUMA": SUB_NUMA,
    "SMT off": SMT_OFF,
    "holes": HOLES,
    "one core": ONE_CORE,
    "hybrid": HYBRID,
}


def write_sysfs(machine: Machine, root: Path) -> None:
    """Write the files of /sys that describe a machine."""
    cores: dict[int, list[int]] = {}
    nodes: dict[int, list[int]] = {}
    for cpu in machine.cpus:
        cores.setdefault(cpu.core, []).append(cpu.number)
        nodes.setdefault(cpu.numa_node, []).append(cpu.number)
    files = {f"node/node{node}/cpulist": format_cpu_list(cpus) for node, cpus in nodes.items()}
    for cpu in machine.cpus:
        files[f"cpu/cpu{cpu.number}/topology/thread_siblings_list"] = format_cpu_list(cores[cpu.core])
        files[f"cpu/cpu{cpu.number}/topology/physical_package_id"] = str(cpu.socket)
        files[f"cpu/cpu{cpu.number}/cpufreq/cpuinfo_max_freq"] = "3800000" if cpu.kind else "5200000"
    for name, text in files.items():
        path = root / "devices/system" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="ascii")
