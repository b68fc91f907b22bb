"""Reads the topology of another machine from the output of `lscpu -J` or, more exactly, `lscpu -J -e`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from finetune_contract.cpu.machine import LogicalCpu, Machine, format_cpu_list, parse_cpu_list
from finetune_contract.cpu.sysfs import slow_cpus

_NODE = re.compile(r"NUMA node(\d+) CPU\(s\):")


def parse_lscpu(text: str) -> Machine:
    """Return the machine that the output describes.

    Raises:
        ValueError: it is not the output of lscpu in JSON. The message says what to write.
    """
    try:
        document = json.loads(text)
    except ValueError as error:
        raise ValueError("it is not JSON; write the output of `lscpu -J -e` or `lscpu -J` into it") from error
    if not isinstance(document, dict) or not ({"cpus", "lscpu"} & document.keys()):
        raise ValueError("it has neither 'cpus' nor 'lscpu'; write the output of `lscpu -J -e` or `lscpu -J` into it")
    try:
        machine = _of_table(document["cpus"]) if "cpus" in document else _of_summary(dict(_fields(document["lscpu"])))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it lacks {error}; write the output of `lscpu -J -e` or `lscpu -J` into it") from error
    if not machine.cpus:
        raise ValueError("it lists no CPU; write the output of `lscpu -J -e` or `lscpu -J` into it")
    return machine


def _of_table(rows: list[Mapping[str, Any]]) -> Machine:
    """Return the machine of `lscpu -J -e`: one row for each logical CPU."""
    rows = [row for row in rows if row.get("online", True) in (True, "yes", None)]
    slow = slow_cpus({int(row["cpu"]): _speed(row.get("maxmhz")) for row in rows})
    first: dict[tuple[int, int], int] = {}
    cpus = []
    for row in sorted(rows, key=lambda row: int(row["cpu"])):
        number, socket = int(row["cpu"]), _count(row.get("socket"))
        core = first.setdefault((socket, int(row["core"])), number)
        cpus.append(LogicalCpu(number, core, socket, _count(row.get("node")), int(number in slow)))
    return Machine(tuple(cpus))


def _of_summary(fields: Mapping[str, str]) -> Machine:
    """Return the machine of `lscpu -J`, which does not name the hardware threads of each core."""
    online = fields.get("On-line CPU(s) list:") or fields["CPU(s):"]
    numbers = parse_cpu_list(online if "On-line CPU(s) list:" in fields else f"0-{int(online) - 1}")
    threads = int(fields.get("Thread(s) per core:", "1"))
    num_sockets = int(fields.get("Socket(s):", "1"))
    nodes = {int(match[1]): parse_cpu_list(value) for name, value in fields.items() if (match := _NODE.match(name))}
    nodes = {node: tuple(sorted(set(cpus) & set(numbers))) for node, cpus in nodes.items()} or {0: numbers}
    nodes = {node: cpus for node, cpus in nodes.items() if cpus}
    cpus: list[LogicalCpu] = []
    for index, (node, members) in enumerate(sorted(nodes.items())):
        siblings = _siblings(members, threads, is_only_node=len(nodes) == 1)
        for number in members:
            core = siblings[number]
            if len(nodes) >= num_sockets:
                socket = index * num_sockets // len(nodes)
            else:  # NUMA is off: the sockets divide the cores
                cores = sorted(set(siblings.values()))
                socket = cores.index(core) * num_sockets // len(cores)
            cpus.append(LogicalCpu(number, core, socket, node))
    assumed = "" if threads == 1 else "lscpu -J does not name the hardware threads of a core: the usual numbering is "
    return Machine(tuple(sorted(cpus)), assumed=assumed and f"{assumed}assumed; `lscpu -J -e` names them")


def _siblings(members: tuple[int, ...], threads: int, *, is_only_node: bool) -> dict[int, int]:
    """Return the first hardware thread of the core of each logical CPU of a NUMA node.

    Kernels number the first threads of all cores, then the second ones (0-55,112-167). Some virtual machines number
    thread by thread (0-111): then the CPUs of one of several nodes have no gap.
    """
    num_cores = max(1, len(members) // threads)
    if is_only_node or "," in format_cpu_list(members):
        return {number: members[index % num_cores] for index, number in enumerate(members)}
    return {number: members[index // threads * threads] for index, number in enumerate(members)}


def _fields(entries: list[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield the fields of the summary; newer versions nest them."""
    for entry in entries:
        if entry.get("data") is not None:
            yield str(entry["field"]), str(entry["data"])
        yield from _fields(entry.get("children") or [])


def _count(value: Any) -> int:
    return int(value) if str(value).isdecimal() else 0


def _speed(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0
