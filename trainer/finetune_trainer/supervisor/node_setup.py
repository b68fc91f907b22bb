"""How the ranks of this pod use its node: backend, cores, memory, network and preloaded libraries.

Decided in `finetune_contract.cpu`; this module reads the machine, logs the decisions and refuses what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from finetune_contract import environment
from finetune_contract.cpu.backend import choose_backend
from finetune_contract.cpu.libraries import Preload, choose_preload, provider_folders
from finetune_contract.cpu.machine import Machine, format_cpu_list
from finetune_contract.cpu.network import Network, read_network
from finetune_contract.cpu.placement import NCCL, Placement, PlacementError, PlacementRequest, place_ranks
from finetune_contract.cpu.requirements import find_missing_cpu_software
from finetune_contract.cpu.spec import CpuBackend
from finetune_contract.cpu.sysfs import read_machine
from finetune_contract.cpu.variables import fabric_variables, thread_variables
from finetune_trainer.supervisor.config import BadEnvironmentError, Config
from finetune_trainer.supervisor.log import log
from finetune_trainer.supervisor.numa import why_not_bindable

PRELOAD = "LD_PRELOAD"


@dataclass(frozen=True)
class NodeSetup:
    """Setup of the ranks of a pod."""

    placement: Placement
    backend: str
    network: Network
    preload: Preload

    def server_variables(self, env: Mapping[str, str]) -> dict[str, str]:
        """Return the variables of the fork server: what its libraries read when they are loaded.

        All ranks share them. A library cannot be preloaded into a process that runs, so not after a fork either.
        """
        values = thread_variables(self.placement.ranks[0], env, has_intel_openmp=self.preload.has_openmp)
        if not self.preload.libraries:
            return values
        # A server that several pods share was started without these libraries.
        return {**values, PRELOAD: self.preload.variable(env.get(PRELOAD, "")), environment.FORK_SERVER: ""}

    def rank_variables(self, local_rank: int, env: Mapping[str, str]) -> dict[str, str]:
        """Return the variables of one rank."""
        place = self.placement.ranks[local_rank]
        values = thread_variables(place, env, has_intel_openmp=self.preload.has_openmp)
        values |= fabric_variables(self.placement, local_rank, self.backend, self.network, env)
        if self.preload.libraries:
            values[PRELOAD] = self.preload.variable(env.get(PRELOAD, ""))
        if self.backend:
            values[environment.BACKEND] = self.backend
        if place.helpers:
            values[environment.HELPER_CPUS] = format_cpu_list(place.helpers)
            values[environment.COMMUNICATION_CPUS] = format_cpu_list(
                place.communication if place.has_own_communication else place.helpers
            )
        return values


class SetupReader:
    """Makes the setup of each world of a pod: the machine's limits and the gang may change."""

    def __init__(self, config: Config, env: Mapping[str, str], read: Callable[[], Machine] = read_machine) -> None:
        """Check what the job requires of the image.

        Raises:
            BadEnvironmentError: the image or the machine lacks what the job requests.
        """
        self._read, self._logged = read, ""
        requested = env.get(environment.BACKEND, "")
        self._is_gpu = requested == NCCL
        if not self._is_gpu:
            # The variable decides: a pod template may set it to a backend that the API does not offer.
            backend = CpuBackend(requested) if requested in set(CpuBackend) else CpuBackend.AUTO
            missing = list(find_missing_cpu_software(config.cpu.model_copy(update={"backend": backend})))
            if missing:
                raise BadEnvironmentError("; ".join(missing))
        try:
            self._choice = choose_backend(requested)
            self._preload = choose_preload(config.cpu.allocator, before=env.get(PRELOAD, ""))
        except ValueError as error:
            raise BadEnvironmentError(str(error)) from error
        self.for_world(config)

    def for_world(self, config: Config) -> NodeSetup:
        """Return the setup in a world; log it if it differs from the one before.

        Raises:
            BadEnvironmentError: no core is left to compute on.
        """
        machine = self._read()
        request = PlacementRequest.of(config.cpu, config.processes_per_node, self._choice.backend)
        try:
            placement = place_ranks(machine, request)
        except PlacementError as error:
            raise BadEnvironmentError(str(error)) from error
        master = config.master_addr
        is_local = config.num_nodes == 1 or master == "localhost" or master.startswith("127.")
        unbound = why_not_bindable() if any(place.memory for place in placement.ranks) else ""
        setup = NodeSetup(
            placement.without_memory() if unbound else placement,
            self._choice.backend,
            read_network(is_local, provider_folders()),
            self._preload,
        )
        lines = self._describe(machine, setup, config, unbound)
        # The network depends on the address of rank 0.
        if not config.must_join and (text := "\n".join(lines)) != self._logged:
            self._logged = text
            for line in lines:
                log(line)
        return setup

    def _describe(self, machine: Machine, setup: NodeSetup, config: Config, unbound: str) -> list[str]:
        network = setup.network
        lines = [f"machine: {machine.describe()}" + (f" ({machine.assumed})" if machine.assumed else "")]
        lines.append(f"placement: {setup.placement.reason}")
        lines += [f"rank {config.rank(i)}: {place.describe()}" for i, place in enumerate(setup.placement.ranks)]
        if unbound:
            lines.append(
                f"memory is not bound, because set_mempolicy is refused ({unbound}); the kernel takes the memory next "
                "to the core that uses it first"
            )
        if self._is_gpu:
            return lines
        if setup.backend:
            lines.append(f"backend {setup.backend}: {self._choice.reason}")
        if setup.backend == CpuBackend.CCL:
            lines.append(f"provider {network.provider}, interface {network.interface or 'any'}: {network.reason}")
        elif setup.backend and config.num_nodes > 1:
            lines.append(f"interface {network.interface or 'any'}: {network.reason}")
        openmp = "libiomp5" if setup.preload.has_openmp else "that of torch"
        lines.append(f"{setup.preload.reason}; OpenMP runtime: {openmp}")
        return lines
