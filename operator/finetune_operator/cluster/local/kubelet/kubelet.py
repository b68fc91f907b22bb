"""Starts, watches, ends and adopts the pods of one job. Events in (deletions, exits), events out (`changed`)."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import uuid
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_operator.cluster.local.files import BrokenFileError, Warn, read_json, write_json
from finetune_operator.cluster.local.home import Home
from finetune_operator.cluster.local.kubelet.container import Place, UnsupportedError, build_container, main_container
from finetune_operator.cluster.local.kubelet.cores import choose_cores, wanted_cores
from finetune_operator.cluster.local.kubelet.devices import choose_gpus, find_gpus, wanted_gpus
from finetune_operator.cluster.local.kubelet.launch import (
    clear_away,
    cores_of_others,
    launch,
    machine_environment,
    pod_folders,
    read_last_words,
    reap,
    resolve_command,
    temporary_folder,
)
from finetune_operator.cluster.local.kubelet.pod import Pod, PodFiles, Processes
from finetune_operator.cluster.local.kubelet.processes import is_alive, kill_marked, send_signal, wait_gone
from finetune_operator.cluster.local.kubelet.shared_forks import SharedForks
from finetune_operator.cluster.local.kubelet.volumes import Configs, missing_configs, prepare_volumes
from finetune_operator.cluster.protocol import Clock, JobKey
from finetune_operator.plan.model.types import Manifest

EXIT_CANNOT_START = 128
"""Exit code of a container that could not even be set up, as containerd reports it."""


@dataclass(frozen=True)
class World:
    """What a kubelet asks of those around it."""

    now: Clock
    spawn: Callable[[Coroutine[Any, Any, None]], object]
    """Starts a task whose failure is nobody's secret."""
    changed: Callable[[], None]
    """Told after every change of a pod."""
    warn: Warn
    configs: Configs
    """The ConfigMaps that exist."""
    master_port: Callable[[int], int]
    """A free port of this machine for the rendezvous of an attempt."""


class Kubelet:
    """The pods of one job on this machine. Its owner holds the job's lock."""

    def __init__(self, home: Home, key: JobKey, world: World) -> None:
        self._home = home
        self._folder = home.job(key)
        self._world = world
        self._pods: dict[str, Pod] = {}
        self._room: int | None = None
        self._kills: dict[str, asyncio.TimerHandle] = {}
        self._startable = asyncio.Event()
        # One pod is started, deleted or taken away at a time: none of them meets a pod that is half of another.
        self._turn = asyncio.Lock()
        self._cores = frozenset(os.sched_getaffinity(0))
        self._gpus = find_gpus()
        self._forks = SharedForks()

    @property
    def pods(self) -> tuple[Pod, ...]:
        """All pods that exist, by name."""
        return tuple(pod for _, pod in sorted(self._pods.items()))

    def get(self, name: str) -> Pod | None:
        """A pod by its name."""
        return self._pods.get(name)

    # -- what the cluster asks for ------------------------------------------------------------------------------------

    async def create(self, manifest: Manifest) -> bool:
        """Create a pod, to be started as soon as it can be; False where one of its name exists."""
        name = manifest["metadata"]["name"]
        if name in self._pods:
            return False
        files = PodFiles(self._folder.pods / name)
        pod = Pod.new(manifest, str(uuid.uuid4()), self._world.now(), files)
        self._pods[name] = pod
        await self._save(pod)
        self.look_for_startable()
        return True

    async def delete(self, name: str, uid: str, grace_seconds: int | None = None) -> None:
        """Delete a pod if it is the one with this UID: SIGTERM, the grace period, SIGKILL. That it is gone is fine."""
        async with self._turn:
            pod = self._pods.get(name)
            if pod is None or pod.uid != uid:
                return
            grace = pod.grace_seconds if grace_seconds is None else grace_seconds
            if not pod.delete(grace, self._world.now()):
                return
            if pod.ended or pod.processes is None:
                await self._remove(pod)
            else:
                await self._save(pod)
                self._end(pod)

    async def preempt(self, name: str, reason: str, message: str) -> None:
        """Take a pod's machine away with notice: DisruptionTarget, then deletion with the pod's own grace period."""
        pod = self._pods.get(name)
        if pod is not None and not pod.ended and not pod.deleted:
            pod.disrupt(reason, message, self._world.now())
            await self.delete(name, pod.uid)

    async def vanish(self, name: str) -> None:
        """Take a pod's machine away at once: its processes are killed and the pod is gone as with its node."""
        async with self._turn:
            if pod := self._pods.get(name):
                await self._remove(pod)

    async def set_room(self, num_pods: int, reason: str, message: str) -> None:
        """From now on there is room for so many pods: of those that run, the ones beyond are taken away with notice."""
        self._room = num_pods
        running = [pod for pod in self.pods if pod.processes is not None and not pod.ended and not pod.deleted]
        for pod in running[num_pods:]:
            await self.preempt(pod.name, reason, message)
        self.look_for_startable()

    async def collect(self, uids: frozenset[str]) -> None:
        """Remove those deleted pods whose end has been seen: they go only after somebody could read how they ended."""
        async with self._turn:
            for pod in self.pods:
                if pod.uid in uids and pod.deleted and pod.ended:
                    await self._remove(pod)

    def look_for_startable(self) -> None:
        """Something changed that a pod may have been waiting for."""
        self._startable.set()

    # -- life across runners ------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take over what an earlier runner left (living pods, ends, leftovers), then start pods as they come."""
        for files in await asyncio.to_thread(pod_folders, self._folder.pods):
            pod = await asyncio.to_thread(self._load, files)
            if pod is None:
                await asyncio.to_thread(clear_away, files.folder)
                continue
            self._pods[pod.name] = pod
            if pod.processes is not None and not pod.ended:
                self._world.spawn(self._watch(pod))
                if pod.deleted:
                    self._end(pod)
        self._world.spawn(self._start_pods())
        self.look_for_startable()

    def close(self) -> None:
        """Send no more signals. Living pods live on, for the next runner to adopt."""
        for timer in self._kills.values():
            timer.cancel()
        self._forks.close()

    def _load(self, files: PodFiles) -> Pod | None:
        """Read a pod; None where it cannot be read or where it died with all that could tell how."""
        try:
            pod = read_json(files.pod, lambda value: Pod.from_json(value, files))
            processes = read_json(files.process, Processes.from_json)
        except BrokenFileError as error:
            self._world.warn(f"{error}: the pod counts as lost with its node")
            return None
        if pod is None or pod.ended:
            return pod
        if processes is None:
            # Its runner died before or while it started: whatever was started is not known to anybody.
            kill_marked(files.folder)
            return pod
        if not is_alive(processes.shim) and not files.exit.exists():
            return None
        pod.processes = processes
        return pod

    # -- the life of one pod ------------------------------------------------------------------------------------------

    async def _start_pods(self) -> None:
        while True:
            await self._startable.wait()
            self._startable.clear()
            for pod in self.pods:
                async with self._turn:
                    if self._pods.get(pod.name) is not pod or pod.ended or pod.processes is not None:
                        continue
                    if pod.deleted:
                        await self._remove(pod)
                    else:
                        await self._start(pod)

    async def _start(self, pod: Pod) -> None:
        if missing := missing_configs(pod.value, self._world.configs):
            await self._wait(pod, "ContainerCreating", f'configmap "{missing[0]}" not found')
        elif not self._has_room():
            await self._wait(pod, "Unschedulable", f"there is room for {self._room} pods")
        elif not await self._assign(pod):
            await self._wait(
                pod, "Unschedulable", "earlier pods of this job still have the cores or GPUs that it needs"
            )
        else:
            try:
                news = await asyncio.to_thread(self._launch, pod)
            except (UnsupportedError, OSError) as error:
                news = {"exitCode": EXIT_CANNOT_START, "message": str(error)}
            if "exitCode" in news:
                await self._ended(pod, news["exitCode"], news["message"])
                return
            pod.processes = Processes.from_json(news)
            pod.run(self._world.now())
            await self._save(pod)
            self._world.spawn(self._watch(pod))

    def _has_room(self) -> bool:
        there = [pod for pod in self.pods if pod.processes is not None and not pod.ended]
        return self._room is None or len(there) < self._room

    async def _assign(self, pod: Pod) -> bool:
        """Give the pod cores and devices that no sibling has; False while there are too few."""
        container = main_container(pod.value)
        others = await asyncio.to_thread(cores_of_others, self._home, self._folder)
        siblings = [other for other in self.pods if other is not pod and not other.ended]
        wanted = wanted_cores(container, pod.num_pods, len(self._cores))
        cores = choose_cores(self._cores, [other.cores for other in siblings], others, wanted)
        gpus = choose_gpus(self._gpus, [other.gpus for other in siblings], wanted_gpus(container))
        if cores is None or gpus is None:
            return False
        pod.assign(f"local-{pod.name.rpartition('-n')[2]}", cores, gpus)
        return True

    def _launch(self, pod: Pod) -> Mapping[str, Any]:
        """Lay out the pod's files and start its shim; return the shim's first words."""
        temporary = temporary_folder(pod.files.folder)
        temporary.mkdir(mode=0o700)
        place = Place(
            folders=prepare_volumes(pod.value, pod.files.folder, self._home, self._world.configs),
            termination_log=pod.files.termination_log,
            temporary=temporary,
            node=pod.value["spec"]["nodeName"],
            master_port=self._world.master_port(pod.attempt),
            gpus=pod.gpus,
        )
        container = self._forks.join(build_container(pod.value, place, machine_environment(), resolve_command))
        return launch(pod.files, container, pod.cores, self._log(pod))

    def _log(self, pod: Pod) -> Path:
        return self._folder.logs / f"{pod.name}.log"

    async def _watch(self, pod: Pod) -> None:
        assert pod.processes is not None
        await wait_gone(pod.processes.shim)
        reap(pod.processes.shim.pid)
        async with self._turn:
            if self._pods.get(pod.name) is not pod:
                return
            code = await asyncio.to_thread(self._read_exit_code, pod)
            if code is None:
                # Shim and container died together: nobody can say how, as when a machine fails.
                await self._remove(pod)
            else:
                await self._ended(pod, code, await asyncio.to_thread(read_last_words, pod.files, self._log(pod)))

    def _read_exit_code(self, pod: Pod) -> int | None:
        try:
            return read_json(pod.files.exit, lambda value: int(value["exitCode"]))
        except BrokenFileError as error:
            self._world.warn(str(error))
            return None

    async def _ended(self, pod: Pod, code: int, message: str) -> None:
        self._disarm(pod)
        await asyncio.to_thread(shutil.rmtree, temporary_folder(pod.files.folder), ignore_errors=True)
        pod.end(code, message, self._world.now())
        await self._save(pod)
        self.look_for_startable()

    def _end(self, pod: Pod) -> None:
        """SIGTERM to the container's first process now, SIGKILL when the grace period is over.

        The shim ends the rest and reports 137.
        """
        if pod.processes is None:
            return
        container = pod.processes.container
        if not self._disarm(pod):
            send_signal(container, signal.SIGTERM)
        seconds = max(0.0, (pod.kill_at - self._world.now()).total_seconds())
        kill = asyncio.get_running_loop().call_later(seconds, send_signal, container, signal.SIGKILL)
        self._kills[pod.uid] = kill

    def _disarm(self, pod: Pod) -> bool:
        """Call a planned SIGKILL off; say whether there was one."""
        timer = self._kills.pop(pod.uid, None)
        if timer is not None:
            timer.cancel()
        return timer is not None

    async def _remove(self, pod: Pod) -> None:
        """Kill what is left of a pod and forget it. Its log stays."""
        self._disarm(pod)
        del self._pods[pod.name]
        if not await asyncio.to_thread(clear_away, pod.files.folder):
            self._world.warn(f"processes of pod {pod.name} survive SIGKILL (a dead disk?) and are left alone")
        self._world.changed()
        self.look_for_startable()

    async def _wait(self, pod: Pod, reason: str, message: str) -> None:
        if pod.wait(reason, message):
            await self._save(pod)

    async def _save(self, pod: Pod) -> None:
        """Write a pod down; on a full disk the pod goes on, and only an adoption would miss what is not written."""
        try:
            await asyncio.to_thread(write_json, pod.files.pod, pod.value)
        except OSError as error:
            self._world.warn(f"{pod.files.pod} cannot be written: {error}")
        self._world.changed()
