"""Backend, network, preloaded libraries and the environment of a rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_contract.cpu.backend import CCL_BINDING, choose_backend
from finetune_contract.cpu.libraries import MissingAllocatorError, choose_preload
from finetune_contract.cpu.network import Network, choose_network
from finetune_contract.cpu.placement import PlacementRequest, place_ranks
from finetune_contract.cpu.requirements import find_missing_cpu_software
from finetune_contract.cpu.spec import Allocator, CpuBackend, CpuSpec
from finetune_contract.cpu.variables import fabric_variables, thread_variables
from finetune_contract.spec import SwitchMode
from tests.cpu.machines import ONE_CORE, REFERENCE

ROUTES = """Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT
eth1\t00000000\t010200C0\t0003\t0\t0\t200\t00000000\t0\t0\t0
eth0\t00000000\t010200C0\t0003\t0\t0\t100\t00000000\t0\t0\t0
eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
"""
TCP = Network("eth0", "tcp", "")
CCL = place_ranks(REFERENCE, PlacementRequest(4, has_worker_threads=True))


def test_auto_uses_oneccl_where_its_binding_is_installed() -> None:
    assert choose_backend("auto", lambda name: name == CCL_BINDING).backend == "ccl"
    chosen = choose_backend("auto", lambda _: False)
    assert chosen.backend == "gloo"
    assert f"{CCL_BINDING} is not installed" in chosen.reason
    assert choose_backend("nccl", lambda _: False).backend == "nccl"
    with pytest.raises(ValueError, match=r"topology\.cpu\.backend: ccl needs .* image trainer-cpu-intel"):
        choose_backend("ccl", lambda _: False)


def test_missing_software_is_named_with_its_field() -> None:
    cpu = CpuSpec(backend=CpuBackend.CCL, ipex=SwitchMode.ON)
    fields = [message.partition(":")[0] for message in find_missing_cpu_software(cpu, lambda _: False)]
    assert fields == ["topology.cpu.backend", "topology.cpu.ipex"]
    assert list(find_missing_cpu_software(cpu, lambda _: True)) == []
    assert list(find_missing_cpu_software(CpuSpec(), lambda _: False)) == []


@pytest.mark.parametrize(
    ("is_local", "routes", "interfaces", "drivers", "installed", "interface", "provider"),
    [
        (True, ROUTES, ["lo", "eth0"], {}, [], "lo", "tcp"),
        (False, ROUTES, ["lo", "eth0", "eth1"], {}, [], "eth0", "tcp"),
        (False, "", ["lo", "net1"], {}, [], "net1", "tcp"),
        (False, "", ["lo", "net1", "net2"], {}, [], "", "tcp"),
        # A fabric is used only if its adapter may be opened and libfabric's provider is installed.
        (False, ROUTES, [], {"mlx5_0": "mlx5_core"}, ["libverbs-1.12-fi.so"], "eth0", "verbs;ofi_rxm"),
        (False, ROUTES, [], {"mlx5_0": "mlx5_core"}, ["libtcp-fi.so"], "eth0", "tcp"),
        (False, ROUTES, [], {"efa_0": "efa"}, ["libefa-fi.so"], "eth0", "efa"),
        (False, ROUTES, [], {"x_0": "unknown"}, ["libefa-fi.so"], "eth0", "tcp"),
    ],
)
def test_network(
    *,
    is_local: bool,
    routes: str,
    interfaces: list[str],
    drivers: dict[str, str],
    installed: list[str],
    interface: str,
    provider: str,
) -> None:
    found = choose_network(is_local, routes, interfaces, drivers, installed)
    assert (found.interface, found.provider) == (interface, provider)
    assert found.reason


def test_every_rank_gets_the_list_of_all_workers() -> None:
    """oneCCL aborts if the list has fewer entries than the pod has workers."""
    values = [fabric_variables(CCL, rank, "ccl", TCP, {}) for rank in range(4)]
    assert [each.pop("CCL_LOCAL_RANK") for each in values] == ["0", "1", "2", "3"]
    assert values[0] == {
        "CCL_PROCESS_LAUNCHER": "none",
        "CCL_LOCAL_SIZE": "4",
        "CCL_ATL_TRANSPORT": "ofi",
        "CCL_WORKER_COUNT": "1",
        "CCL_WORKER_AFFINITY": "27,55,83,111",
        "FI_PROVIDER": "tcp",
        "CCL_KVS_IFACE": "eth0",
        "FI_TCP_IFACE": "eth0",
    }
    assert values[1:] == values[:1] * 3


def test_the_list_has_an_entry_for_each_worker_of_a_rank() -> None:
    two = place_ranks(REFERENCE, PlacementRequest(2, cores_for_communication=2, has_worker_threads=True))
    values = fabric_variables(two, 0, "ccl", TCP, {})
    assert (values["CCL_WORKER_COUNT"], values["CCL_WORKER_AFFINITY"]) == ("2", "54,55,110,111")
    # A number that the user has set counts.
    assert fabric_variables(CCL, 0, "ccl", TCP, {"CCL_WORKER_COUNT": "2"})["CCL_WORKER_AFFINITY"] == (
        "27,27,55,55,83,83,111,111"
    )
    own = {"CCL_WORKER_AFFINITY": "1,2,3,4", "FI_PROVIDER": "psm3"}
    assert own.items() <= fabric_variables(CCL, 0, "ccl", TCP, own).items()
    crowded = place_ranks(ONE_CORE, PlacementRequest(4, has_worker_threads=True))
    assert fabric_variables(crowded, 0, "ccl", TCP, {})["CCL_WORKER_AFFINITY"] == "0,1,0,1"


def test_gloo_gets_the_interface_of_the_network() -> None:
    assert fabric_variables(CCL, 0, "gloo", TCP, {}) == {"GLOO_SOCKET_IFNAME": "eth0"}
    assert fabric_variables(CCL, 0, "gloo", TCP, {"GLOO_SOCKET_IFNAME": "ib0"}) == {"GLOO_SOCKET_IFNAME": "ib0"}
    assert fabric_variables(CCL, 0, "gloo", Network("lo", "tcp", ""), {}) == {}
    assert fabric_variables(CCL, 0, "nccl", TCP, {}) == {}


def test_threads_are_those_of_the_place_unless_the_user_sets_them() -> None:
    place = CCL.ranks[0]
    assert thread_variables(place, {}) == {"OMP_NUM_THREADS": "27", "MKL_NUM_THREADS": "27"}
    assert thread_variables(place, {"OMP_NUM_THREADS": "3"}, has_intel_openmp=True) == {
        "OMP_NUM_THREADS": "3",
        "MKL_NUM_THREADS": "27",
        "KMP_BLOCKTIME": "1",
    }


def library(folder: Path, name: str) -> str:
    (folder / name).write_bytes(b"")
    return str(folder / name)


def test_libraries_are_preloaded_where_the_image_has_them(tmp_path: Path) -> None:
    assert choose_preload(Allocator.AUTO, [tmp_path]).libraries == ()
    with pytest.raises(MissingAllocatorError, match=r"topology\.cpu\.allocator: jemalloc .* allocator: auto"):
        choose_preload(Allocator.JEMALLOC, [tmp_path])
    openmp, jemalloc = library(tmp_path, "libiomp5.so"), library(tmp_path, "libjemalloc.so.2")
    auto = choose_preload(Allocator.AUTO, [tmp_path])
    assert auto.libraries == (openmp, jemalloc)
    assert auto.has_openmp
    assert "jemalloc" in auto.reason
    tcmalloc = library(tmp_path, "libtcmalloc_minimal.so.4")
    assert choose_preload(Allocator.AUTO, [tmp_path]).libraries == (openmp, tcmalloc)
    assert choose_preload(Allocator.JEMALLOC, [tmp_path]).libraries == (openmp, jemalloc)
    assert choose_preload(Allocator.GLIBC, [tmp_path]).libraries == (openmp,)


def test_an_allocator_that_the_user_preloads_is_kept(tmp_path: Path) -> None:
    library(tmp_path, "libtcmalloc_minimal.so.4")
    before = "/opt/x/libjemalloc.so.2"
    chosen = choose_preload(Allocator.AUTO, [tmp_path], before)
    assert chosen.libraries == ()
    assert "jemalloc, because LD_PRELOAD contains it" in chosen.reason
    assert chosen.variable(before) == before
