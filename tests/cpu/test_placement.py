"""Placement of ranks on machines: tables, and the rules that hold on all of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_contract.cpu.machine import Machine
from finetune_contract.cpu.placement import Placement, PlacementError, PlacementRequest, RankPlace, place_ranks
from finetune_contract.cpu.spec import RanksPer
from tests.cpu.machines import HOLES, HYBRID, MACHINES, ONE_CORE, ONE_SOCKET, REFERENCE, SMT_OFF, SUB_NUMA, make_machine


def cpus_of(place: RankPlace) -> set[int]:
    return {*place.compute, *place.communication, *place.helpers}


def check(machine: Machine, placement: Placement, num_ranks: int) -> None:
    """Check what holds for every placement."""
    cores = {cpu: index for index, core in enumerate(machine.cores) for cpu in core.cpus}
    assert len(placement.ranks) == num_ranks
    assert all(place.num_threads >= 1 for place in placement.ranks)
    if len(machine.cpus) < num_ranks:
        return
    used = [{cores[cpu] for cpu in cpus_of(place)} for place in placement.ranks]
    assert set().union(*used) == set(range(len(machine.cores))), "a core is idle"
    for place in placement.ranks:
        if place.has_own_communication:
            assert not {cores[cpu] for cpu in place.compute} & {cores[cpu] for cpu in place.communication}
        if machine.quota is None and len(machine.cores) >= num_ranks:
            assert place.num_threads == len(place.compute) == len({cores[cpu] for cpu in place.compute})
    if len(machine.cores) >= num_ranks:
        assert sum(map(len, used)) == len(machine.cores), "two ranks share a core"


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("ranks_per", list(RanksPer))
@pytest.mark.parametrize("has_workers", [False, True])
def test_no_core_is_shared_or_idle(name: str, num_ranks: int, ranks_per: RanksPer, has_workers: bool) -> None:
    machine = MACHINES[name]
    request = PlacementRequest(num_ranks, ranks_per, has_worker_threads=has_workers)
    check(machine, place_ranks(machine, request), num_ranks)
    limited = replace(machine, quota=0.6 * len(machine.cpus))
    check(limited, place_ranks(limited, request), num_ranks)


@given(
    sockets=st.integers(1, 3),
    nodes=st.integers(1, 3),
    cores=st.integers(1, 5),
    threads=st.integers(1, 2),
    num_ranks=st.integers(1, 9),
    ranks_per=st.sampled_from(RanksPer),
    has_workers=st.booleans(),
    quota=st.none() | st.floats(0.1, 40),
    data=st.data(),
)
def test_the_rules_hold_on_every_machine(
    *,
    sockets: int,
    nodes: int,
    cores: int,
    threads: int,
    num_ranks: int,
    ranks_per: RanksPer,
    has_workers: bool,
    quota: float | None,
    data: st.DataObject,
) -> None:
    machine = make_machine(sockets, nodes, cores, threads)
    allowed = data.draw(st.sets(st.sampled_from([cpu.number for cpu in machine.cpus]), min_size=1))
    machine = replace(machine.restricted_to(allowed), quota=quota)
    check(
        machine, place_ranks(machine, PlacementRequest(num_ranks, ranks_per, has_worker_threads=has_workers)), num_ranks
    )


def spans(*ends: tuple[int, int]) -> list[tuple[int, ...]]:
    return [tuple(range(first, last + 1)) for first, last in ends]


@pytest.mark.parametrize(
    ("machine", "num_ranks", "compute", "memory"),
    [
        (REFERENCE, 2, spans((0, 55), (56, 111)), [(0,), (1,)]),
        # The reference case: four ranks on a machine; the second threads of their cores (112-223) compute nothing.
        (REFERENCE, 4, spans((0, 27), (28, 55), (56, 83), (84, 111)), [(0,), (0,), (1,), (1,)]),
        (REFERENCE, 1, spans((0, 111)), [()]),
        (REFERENCE, 3, spans((0, 37), (38, 74), (75, 111)), [(0,), (), (1,)]),
        (SMT_OFF, 2, spans((0, 55), (56, 111)), [(0,), (1,)]),
        (SUB_NUMA, 8, spans(*((14 * n, 14 * n + 13) for n in range(8))), [(n,) for n in range(8)]),
        (SUB_NUMA, 2, spans((0, 55), (56, 111)), [(0, 1, 2, 3), (4, 5, 6, 7)]),
        (ONE_SOCKET, 2, spans((0, 7), (8, 15)), [(), ()]),
        # Eight cores of one node and four of the other: ranks in lockstep get six each.
        (HOLES, 2, [(0, 1, 2, 3, 4, 5), (6, 7, 56, 57, 58, 59)], [(0,), ()]),
        (HOLES, 3, [(0, 1, 2, 3), (4, 5, 6, 7), (56, 57, 58, 59)], [(0,), (0,), (1,)]),
        (ONE_CORE, 1, [(0,)], [()]),
        # Two ranks on one core: each gets one of its threads. Three share both.
        (ONE_CORE, 2, [(0,), (1,)], [(), ()]),
        (ONE_CORE, 3, [(), (), ()], [(), (), ()]),
        # Each rank gets as many large and small cores as the others.
        (HYBRID, 2, [(0, 2, 4, 12, 13, 14, 15), (6, 8, 10, 16, 17, 18, 19)], [(), ()]),
        (HYBRID, 4, [(0, 2, 12, 13), (4, 6, 14, 15), (8, 16, 17), (10, 18, 19)], [(), (), (), ()]),
    ],
)
def test_places(
    machine: Machine, num_ranks: int, compute: list[tuple[int, ...]], memory: list[tuple[int, ...]]
) -> None:
    places = place_ranks(machine, PlacementRequest(num_ranks)).ranks
    assert [place.compute for place in places] == compute
    assert [place.memory for place in places] == memory
    assert [place.communication for place in places] == [()] * num_ranks


def test_ranks_per_socket_and_node() -> None:
    ranks = place_ranks(SUB_NUMA, PlacementRequest(4, RanksPer.SOCKET)).ranks
    assert [place.memory for place in ranks] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    ranks = place_ranks(SUB_NUMA, PlacementRequest(2, RanksPer.NODE)).ranks
    assert [place.memory for place in ranks] == [(), ()]


def test_oneccl_gets_a_core_of_each_rank() -> None:
    ranks = place_ranks(REFERENCE, PlacementRequest(4, has_worker_threads=True)).ranks
    assert [place.communication for place in ranks] == [(27,), (55,), (83,), (111,)]
    assert [place.num_threads for place in ranks] == [27] * 4
    assert all(place.has_own_communication for place in ranks)
    # With fewer than four cores the second thread of a core, or the last core itself.
    assert [p.communication for p in place_ranks(ONE_CORE, PlacementRequest(1, has_worker_threads=True)).ranks] == [
        (1,)
    ]
    two = place_ranks(make_machine(cores=2), PlacementRequest(2, has_worker_threads=True)).ranks
    assert [(place.compute, place.communication) for place in two] == [((0,), (0,)), ((1,), (1,))]


def test_requested_cores_for_communication() -> None:
    ranks = place_ranks(ONE_SOCKET, PlacementRequest(2, cores_for_communication=2)).ranks
    assert [(place.compute, place.communication) for place in ranks] == [
        (tuple(range(6)), (6, 7)),
        (tuple(range(8, 14)), (14, 15)),
    ]
    none = place_ranks(REFERENCE, PlacementRequest(2, cores_for_communication=0, has_worker_threads=True)).ranks
    assert [(place.num_threads, place.communication) for place in none] == [(56, (167,)), (56, (223,))]
    # A communication core of a hybrid processor is a small one.
    hybrid = place_ranks(HYBRID, PlacementRequest(2, cores_for_communication=1)).ranks
    assert [place.communication for place in hybrid] == [(15,), (19,)]


@pytest.mark.parametrize("machine", [make_machine(cores=4), replace(ONE_SOCKET, quota=4.0), ONE_CORE])
def test_too_many_cores_for_communication_are_refused(machine: Machine) -> None:
    with pytest.raises(PlacementError, match=r"coresForCommunication: 2 leaves no core .* write at most"):
        place_ranks(machine, PlacementRequest(2, cores_for_communication=2))


def test_a_quota_without_cpuset_limits_threads_and_divides_the_machine() -> None:
    """Other pods use the machine, too: a rank may use all threads of its NUMA node, so that it avoids busy CPUs."""
    limited = replace(REFERENCE, quota=32.0)
    first, second = place_ranks(limited, PlacementRequest(2)).ranks
    assert (first.num_threads, second.num_threads) == (16, 16)
    assert first.compute == (*range(56), *range(112, 168))
    assert (first.memory, second.memory) == ((0,), (1,))
    with_worker = place_ranks(limited, PlacementRequest(2, has_worker_threads=True)).ranks
    assert [(place.num_threads, place.communication) for place in with_worker] == [(15, (167,)), (15, (223,))]
    small = place_ranks(replace(make_machine(cores=2), quota=0.5), PlacementRequest(1)).ranks
    assert small[0].num_threads == 1
    odd = place_ranks(replace(ONE_SOCKET, quota=7.5), PlacementRequest(2)).ranks
    assert [place.num_threads for place in odd] == [4, 3]
    enough = place_ranks(replace(ONE_SOCKET, quota=32.0), PlacementRequest(1)).ranks
    assert enough[0].compute == tuple(range(16))


def test_ranks_on_gpu_nodes_use_all_threads_of_their_cores() -> None:
    places = place_ranks(REFERENCE, PlacementRequest(2, one_thread_per_core=False)).ranks
    assert places[0].compute == (*range(56), *range(112, 168))
    assert places[0].num_threads == 56


def test_a_place_is_described() -> None:
    place = place_ranks(REFERENCE, PlacementRequest(4, has_worker_threads=True)).ranks[3]
    assert place.describe() == "27 threads on CPUs 84-110, communication on 111, memory of NUMA node 1"
    assert RankPlace(1, ()).describe() == "1 thread, not pinned"
