"""Starts, watches, stops and adopts the pods of one job. It reacts to deletions and exits, and calls `changed`."""

from __future__ import annotations

import asyncio
import copy
import os
import shutil
import signal
import uuid
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_contract.cpu.sysfs import read_topology
from finetune_operator.cluster.local.files import BrokenFileError, Warn, read_json, write_json
from finetune_operator.cluster.local.home import Home
from finetune_operator.cluster.local.kubelet.container import (
    LocalResources,
    UnsupportedError,
    build_container,
    main_container,
)
from finetune_operator.cluster.local.kubelet.cores import choose_cores, wanted_cores
from finetune_operator.cluster.local.kubelet.devices import choose_gpus, find_gpus, wanted_gpus
from finetune_operator.cluster.local.kubelet.launch import (
    cores_of_other_jobs,
    find_pods,
    kill_and_remove,
    launch,
    machine_environment,
    read_termination_message,
    reap,
    resolve_command,
    temporary_folder,
)
from finetune_operator.cluster.local.kubelet.pod import Pod, PodFiles, Processes
from finetune_operator.cluster.local.kubelet.processes import is_alive, kill_marked, send_signal, wait_for_exit
from finetune_operator.cluster.local.kubelet.shared_fork_server import SharedForkServer
from finetune_operator.cluster.local.kubelet.volumes import (
    Configs,
    MissingConfigError,
    missing_configs,
    prepare_volumes,
)
from finetune_operator.cluster.protocol import Clock, JobKey
from finetune_operator.plan.model.types import Manifest

EXIT_CANNOT_START = 128
"""Exit code of a container that could not be set up, as containerd reports it."""


@dataclass(frozen=True)
class KubeletContext:
    """Functions that a kubelet needs from its owner."""

    now: Clock
    spawn: Callable[[Coroutine[Any, Any, None]], object]
    """Starts a task and surfaces its errors."""
    changed: Callable[[], None]
    """Called after every change of a pod."""
    warn: Warn
    configs: Configs
    """Returns the ConfigMaps that exist."""
    master_port: Callable[[int], int]
    """Returns a free port of this machine for the rendezvous of an attempt."""


class Kubelet:
    """Runs the pods of one job on this machine. Its owner holds the job's lock."""

    def __init__(self, home: Home, key: JobKey, context: KubeletContext) -> None:
        self._home = home
        self._folder = home.job(key)
        self._context = context
        self._pods: dict[str, Pod] = {}
        self._capacity: int | None = None
        self._kills: dict[str, asyncio.TimerHandle] = {}
        self._recheck = asyncio.Event()
        # Only one pod is started, deleted or preempted at a time, so that no operation interrupts another halfway.
        self._pod_lock = asyncio.Lock()
        # The hardware threads of a core are next to each other, so that they belong to the same pod.
        self._cores = tuple(cpu for core in read_topology(os.sched_getaffinity(0)).cores for cpu in core.cpus)
        self._gpus = find_gpus()
        self._fork_server = SharedForkServer()

    @property
    def pods(self) -> tuple[Pod, ...]:
        """All pods that exist, sorted by name."""
        return tuple(pod for _, pod in sorted(self._pods.items()))

    def get(self, name: str) -> Pod | None:
        """Return the pod with a name; None if it does not exist."""
        return self._pods.get(name)

    # -- requests of the cluster --------------------------------------------------------------------------------------

    async def create(self, manifest: Manifest) -> bool:
        """Create a pod and start it as soon as possible. Return False if a pod with its name exists."""
        name = manifest["metadata"]["name"]
        if name in self._pods:
            return False
        files = PodFiles(self._folder.pods / name)
        pod = Pod.new(manifest, str(uuid.uuid4()), self._context.now(), files)
        self._pods[name] = pod
        await self._save(pod)
        self.recheck_waiting_pods()
        return True

    async def delete(self, name: str, uid: str, grace_seconds: int | None = None) -> None:
        """Delete the pod with this name and UID, if it exists: SIGTERM, the grace period, SIGKILL."""
        async with self._pod_lock:
            pod = self._pods.get(name)
            if pod is None or pod.uid != uid:
                return
            grace = pod.grace_seconds if grace_seconds is None else grace_seconds
            if not pod.set_deleted(grace, self._context.now()):
                return
            if pod.ended or pod.processes is None:
                await self._remove(pod)
            else:
                await self._save(pod)
                self._terminate(pod)

    async def preempt(self, name: str, reason: str, message: str) -> None:
        """Preempt a pod with a preemption notice: DisruptionTarget, then deletion with the pod's own grace period."""
        pod = self._pods.get(name)
        if pod is not None and not pod.ended and not pod.deleted:
            pod.set_disrupted(reason, message, self._context.now())
            await self.delete(name, pod.uid)

    async def kill_pod(self, name: str) -> None:
        """Kill a pod's processes and remove the pod, as if its node failed."""
        async with self._pod_lock:
            if pod := self._pods.get(name):
                await self._remove(pod)

    async def set_capacity(self, num_pods: int, reason: str, message: str) -> None:
        """Limit the capacity to a number of pods from now on, and preempt the excess running pods with a notice."""
        self._capacity = num_pods
        running = [pod for pod in self.pods if pod.processes is not None and not pod.ended and not pod.deleted]
        for pod in running[num_pods:]:
            await self.preempt(pod.name, reason, message)
        self.recheck_waiting_pods()

    async def remove_ended(self, uids: frozenset[str]) -> None:
        """Remove the deleted and ended pods among these. The caller has read how they ended."""
        async with self._pod_lock:
            for pod in self.pods:
                if pod.uid in uids and pod.deleted and pod.ended:
                    await self._remove(pod)

    def recheck_waiting_pods(self) -> None:
        """Check again whether waiting pods can start, after a change of ConfigMaps, cores or capacity."""
        self._recheck.set()

    # -- start and end of a runner ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Adopt running and ended pods of an earlier runner, remove its leftovers, then start waiting pods."""
        for files in await asyncio.to_thread(find_pods, self._folder.pods):
            pod = await asyncio.to_thread(self._load, files)
            if pod is None:
                await asyncio.to_thread(kill_and_remove, files.folder)
                continue
            self._pods[pod.name] = pod
            if pod.processes is not None and not pod.ended:
                self._context.spawn(self._watch(pod))
                if pod.deleted:
                    self._terminate(pod)
        self._context.spawn(self._start_pods())
        self.recheck_waiting_pods()

    def close(self) -> None:
        """Cancel pending signals. Running pods continue, and the next runner adopts them."""
        for timer in self._kills.values():
            timer.cancel()
        self._fork_server.close()

    def _load(self, files: PodFiles) -> Pod | None:
        """Read a pod. Return None if its files are invalid, or if its shim was killed before it wrote an exit code."""
        try:
            pod = read_json(files.pod, lambda value: Pod.from_json(value, files))
            processes = read_json(files.process, Processes.from_json)
        except BrokenFileError as error:
            self._context.warn(f"{error}: the pod is treated as lost with its node")
            return None
        if pod is None or pod.ended:
            return pod
        if processes is None:
            # Its runner exited before or during the start, so processes may run that no file lists.
            kill_marked(files.folder)
            return pod
        if not is_alive(processes.shim) and not files.exit.exists():
            return None
        pod.processes = processes
        return pod

    # -- lifecycle of one pod -----------------------------------------------------------------------------------------

    async def _start_pods(self) -> None:
        while True:
            await self._recheck.wait()
            self._recheck.clear()
            for pod in self.pods:
                async with self._pod_lock:
                    if self._pods.get(pod.name) is not pod or pod.ended or pod.processes is not None:
                        continue
                    if pod.deleted:
                        await self._remove(pod)
                    else:
                        await self._start(pod)

    async def _start(self, pod: Pod) -> None:
        if missing := missing_configs(pod.value, self._context.configs):
            await self._keep_waiting(pod, "ContainerCreating", f'configmap "{missing[0]}" not found')
        elif not self._has_capacity():
            await self._keep_waiting(pod, "Unschedulable", f"the capacity is limited to {self._capacity} pods")
        elif not await self._assign(pod):
            await self._keep_waiting(
                pod, "Unschedulable", "earlier pods of this job still use the cores or GPUs that it needs"
            )
        else:
            try:
                answer = await asyncio.to_thread(self._launch, pod)
            except MissingConfigError as error:
                # It was deleted after the check above.
                await self._keep_waiting(pod, "ContainerCreating", str(error))
                return
            except (UnsupportedError, OSError) as error:
                answer = {"exitCode": EXIT_CANNOT_START, "message": str(error)}
            if "exitCode" in answer:
                await self._record_end(pod, answer["exitCode"], answer["message"])
                return
            pod.processes = Processes.from_json(answer)
            pod.set_running(self._context.now())
            await self._save(pod)
            self._context.spawn(self._watch(pod))

    def _has_capacity(self) -> bool:
        running = [pod for pod in self.pods if pod.processes is not None and not pod.ended]
        return self._capacity is None or len(running) < self._capacity

    async def _assign(self, pod: Pod) -> bool:
        """Assign cores and devices that no sibling uses. Return False if too few are free."""
        container = main_container(pod.value)
        others = await asyncio.to_thread(cores_of_other_jobs, self._home, self._folder)
        siblings = [other for other in self.pods if other is not pod and not other.ended]
        wanted = wanted_cores(container, pod.num_pods, len(self._cores))
        cores = choose_cores(self._cores, [other.cores for other in siblings], others, wanted)
        gpus = choose_gpus(self._gpus, [other.gpus for other in siblings], wanted_gpus(container))
        if cores is None or gpus is None:
            return False
        pod.assign(f"local-{pod.name.rpartition('-n')[2]}", cores, gpus)
        return True

    def _launch(self, pod: Pod) -> Mapping[str, Any]:
        """Create the pod's files and start its shim. Return the shim's answer."""
        temporary = temporary_folder(pod.files.folder)
        temporary.mkdir(mode=0o700, exist_ok=True)
        resources = LocalResources(
            folders=prepare_volumes(pod.value, pod.files.folder, self._home, self._context.configs),
            termination_log=pod.files.termination_log,
            temporary=temporary,
            node=pod.value["spec"]["nodeName"],
            master_port=self._context.master_port(pod.attempt),
            gpus=pod.gpus,
        )
        container = build_container(pod.value, resources, machine_environment(), resolve_command)
        return launch(pod.files, self._fork_server.attach(container), pod.cores, self._log_file(pod))

    def _log_file(self, pod: Pod) -> Path:
        return self._folder.logs / f"{pod.name}.log"

    async def _watch(self, pod: Pod) -> None:
        assert pod.processes is not None
        await wait_for_exit(pod.processes.shim)
        reap(pod.processes.shim.pid)
        async with self._pod_lock:
            if self._pods.get(pod.name) is not pod:
                return
            code = await asyncio.to_thread(self._read_exit_code, pod)
            if code is None:
                # Shim and container were killed together. Their exit code is unknown, as after a machine failure.
                await self._remove(pod)
            else:
                message = await asyncio.to_thread(read_termination_message, pod.files, self._log_file(pod))
                await self._record_end(pod, code, message)

    def _read_exit_code(self, pod: Pod) -> int | None:
        try:
            return read_json(pod.files.exit, lambda value: int(value["exitCode"]))
        except BrokenFileError as error:
            self._context.warn(str(error))
            return None

    async def _record_end(self, pod: Pod, code: int, message: str) -> None:
        self._cancel_kill(pod)
        await asyncio.to_thread(shutil.rmtree, temporary_folder(pod.files.folder), ignore_errors=True)
        pod.set_ended(code, message, self._context.now())
        await self._save(pod)
        self.recheck_waiting_pods()

    def _terminate(self, pod: Pod) -> None:
        """Send SIGTERM to the container's first process now, and SIGKILL after the grace period.

        After SIGKILL, the shim kills the remaining processes and reports 137.
        """
        if pod.processes is None:
            return
        container = pod.processes.container
        if not self._cancel_kill(pod):
            send_signal(container, signal.SIGTERM)
        seconds = max(0.0, (pod.kill_at - self._context.now()).total_seconds())
        kill = asyncio.get_running_loop().call_later(seconds, send_signal, container, signal.SIGKILL)
        self._kills[pod.uid] = kill

    def _cancel_kill(self, pod: Pod) -> bool:
        """Cancel a pending SIGKILL. Return whether one was pending."""
        timer = self._kills.pop(pod.uid, None)
        if timer is not None:
            timer.cancel()
        return timer is not None

    async def _remove(self, pod: Pod) -> None:
        """Kill the remaining processes of a pod and remove it. Its log is kept."""
        self._cancel_kill(pod)
        del self._pods[pod.name]
        if not await asyncio.to_thread(kill_and_remove, pod.files.folder):
            self._context.warn(f"processes of pod {pod.name} do not exit after SIGKILL (a failed disk?); ignoring them")
        self._context.changed()
        self.recheck_waiting_pods()

    async def _keep_waiting(self, pod: Pod, reason: str, message: str) -> None:
        if pod.set_waiting(reason, message):
            await self._save(pod)

    async def _save(self, pod: Pod) -> None:
        """Write a pod to its file. If the disk is full, the pod continues; only a later adoption lacks the change."""
        try:
            # A copy: other tasks change the pod while the thread writes.
            await asyncio.to_thread(write_json, pod.files.pod, copy.deepcopy(pod.value))
        except OSError as error:
            self._context.warn(f"{pod.files.pod} cannot be written: {error}")
        self._context.changed()
