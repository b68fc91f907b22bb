"""Pods as processes: start, preemption notice, end, kill, adoption."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from finetune_operator.cluster.local.kubelet.pod import Pod
from finetune_operator.cluster.local.kubelet.processes import find_marked, is_alive
from finetune_operator.plan.model.types import PodPhase
from tests.local.harness import KEY, READY, KubeletHarness, terminated_state

POD = "circles-a1-n0"
SAVES_ON_SIGTERM = (
    READY + "signal.signal(signal.SIGTERM, lambda *_: (mark('saved'), sys.exit(75))); mark('up'); signal.pause()"
)
IGNORES_SIGTERM = READY + "signal.signal(signal.SIGTERM, signal.SIG_IGN); mark('up'); time.sleep(600)"


@pytest.fixture
def harness(tmp_path: Path) -> KubeletHarness:
    return KubeletHarness(tmp_path)


async def started(harness: KubeletHarness, kubelet: object, code: str) -> Pod:
    await kubelet.create(harness.python_pod(code))  # type: ignore[attr-defined]
    await harness.wait_for_file("up")
    pod = kubelet.get(POD)  # type: ignore[attr-defined]
    assert isinstance(pod, Pod)
    await harness.wait_until(lambda: pod.phase is PodPhase.RUNNING)
    return pod


def test_exit_code_log_and_termination_message(harness: KubeletHarness) -> None:
    async def check() -> None:
        async with harness.kubelet() as kubelet:
            code = "import sys; print('hello'); open('/dev/termination-log', 'w'); sys.exit(3)"
            await kubelet.create(harness.python_pod(code.replace("/dev/termination-log", "/data/x")))
            await harness.wait_until(lambda: (pod := kubelet.get(POD)) is not None and pod.ended)
            pod = kubelet.get(POD)
            assert pod is not None
            assert pod.phase is PodPhase.FAILED
            assert terminated_state(pod)["exitCode"] == 3
            # It wrote no termination message: the end of its log replaces it.
            assert terminated_state(pod)["message"] == "hello"
            assert (harness.home.job(KEY).logs / f"{POD}.log").read_text() == "hello\n"

    asyncio.run(check())


def test_preemption_sends_sigterm_and_keeps_the_ended_pod_until_it_is_read(harness: KubeletHarness) -> None:
    async def check() -> None:
        async with harness.kubelet() as kubelet:
            pod = await started(harness, kubelet, SAVES_ON_SIGTERM)
            await kubelet.preempt(POD, "TerminationByKubelet", "the node shuts down")
            await harness.wait_until(lambda: pod.ended)
            assert (harness.data / "saved").exists()
            assert terminated_state(pod)["exitCode"] == 75
            conditions = {condition["type"]: condition for condition in pod.value["status"]["conditions"]}
            assert conditions["DisruptionTarget"]["reason"] == "TerminationByKubelet"
            assert kubelet.get(POD) is pod
            await kubelet.remove_ended(frozenset({pod.uid}))
            assert kubelet.get(POD) is None
            assert not pod.files.folder.exists()

    asyncio.run(check())


def test_a_pod_that_ignores_sigterm_is_killed_after_its_grace_period(harness: KubeletHarness) -> None:
    async def check() -> None:
        async with harness.kubelet() as kubelet:
            pod = await started(harness, kubelet, IGNORES_SIGTERM)
            await kubelet.delete(POD, pod.uid, grace_seconds=1)
            await harness.wait_until(lambda: pod.ended)
            assert terminated_state(pod)["exitCode"] == 128 + signal.SIGKILL

    asyncio.run(check())


def test_all_processes_end_with_the_first_process(harness: KubeletHarness) -> None:
    """A grandchild in its own session, which gets no SIGTERM, ends with the pod's first process."""
    code = (
        READY + "import subprocess; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], "
        "start_new_session=True); mark('up'); signal.pause()"
    )

    async def check() -> None:
        async with harness.kubelet() as kubelet:
            pod = await started(harness, kubelet, code)
            assert len(find_marked(pod.files.folder)) == 3  # shim, container, grandchild
            await kubelet.delete(POD, pod.uid)
            await harness.wait_until(lambda: pod.ended)
            assert find_marked(pod.files.folder) == []

    asyncio.run(check())


def test_kill_pod_removes_the_pod_without_notice(harness: KubeletHarness) -> None:
    async def check() -> None:
        async with harness.kubelet() as kubelet:
            pod = await started(harness, kubelet, SAVES_ON_SIGTERM)
            await kubelet.kill_pod(POD)
            assert kubelet.pods == ()
            assert find_marked(pod.files.folder) == []
            assert not (harness.data / "saved").exists()

    asyncio.run(check())


def test_the_kill_of_a_shim_kills_its_container(harness: KubeletHarness) -> None:
    async def check() -> None:
        async with harness.kubelet() as kubelet:
            pod = await started(harness, kubelet, IGNORES_SIGTERM)
            assert pod.processes is not None
            os.kill(pod.processes.shim.pid, signal.SIGKILL)
            await harness.wait_until(lambda: kubelet.get(POD) is None)
            assert not is_alive(pod.processes.container)

    asyncio.run(check())


def test_running_pods_are_adopted(harness: KubeletHarness) -> None:
    async def check() -> None:
        async with harness.kubelet() as kubelet:
            first = await started(harness, kubelet, SAVES_ON_SIGTERM)
        async with harness.kubelet() as kubelet:
            pod = kubelet.get(POD)
            assert pod is not None
            assert pod is not first
            assert pod.processes == first.processes
            await kubelet.delete(POD, pod.uid)
            await harness.wait_until(lambda: pod.ended)
            assert terminated_state(pod)["exitCode"] == 75

    asyncio.run(check())


def test_an_end_without_a_runner_is_read_later(harness: KubeletHarness) -> None:
    async def check() -> None:
        async with harness.kubelet() as kubelet:
            code = READY + "mark('up')\nwhile not pathlib.Path('/data/go').exists(): time.sleep(0.005)\nsys.exit(7)"
            pod = await started(harness, kubelet, code)
        (harness.data / "go").touch()
        async with asyncio.timeout(30):
            while not pod.files.exit.exists():  # noqa: ASYNC110  another process's file
                await asyncio.sleep(0.005)
        async with harness.kubelet() as kubelet:
            adopted = kubelet.get(POD)
            assert adopted is not None
            await harness.wait_until(lambda: adopted.ended)
            assert terminated_state(adopted)["exitCode"] == 7

    asyncio.run(check())


def test_a_pod_that_was_killed_without_a_runner_is_removed(harness: KubeletHarness) -> None:
    async def check() -> None:
        async with harness.kubelet() as kubelet:
            pod = await started(harness, kubelet, IGNORES_SIGTERM)
        assert pod.processes is not None
        os.kill(pod.processes.shim.pid, signal.SIGKILL)
        os.waitpid(pod.processes.shim.pid, 0)  # noqa: ASYNC222  it was killed
        async with harness.kubelet() as kubelet:
            assert kubelet.pods == ()
        assert not pod.files.folder.exists()

    asyncio.run(check())


def test_the_next_runner_kills_a_deleted_pod_after_its_grace_period(harness: KubeletHarness) -> None:
    async def check() -> None:
        async with harness.kubelet() as kubelet:
            pod = await started(harness, kubelet, IGNORES_SIGTERM)
            await kubelet.delete(POD, pod.uid, grace_seconds=1)
        async with harness.kubelet() as kubelet:
            adopted = kubelet.get(POD)
            assert adopted is not None
            assert adopted.deleted
            await harness.wait_until(lambda: adopted.ended)

    asyncio.run(check())


@pytest.mark.parametrize("garbage", [b"", b"{", b"\xff\xfe", b"[]", b'{"metadata": {}}', b"null"])
@pytest.mark.parametrize("file", ["pod.json", "process.json"])
def test_broken_files_of_a_pod_lose_only_that_pod(harness: KubeletHarness, garbage: bytes, file: str) -> None:
    async def check() -> None:
        async with harness.kubelet() as kubelet:
            pod = await started(harness, kubelet, IGNORES_SIGTERM)
        (pod.files.folder / file).write_bytes(garbage)
        async with harness.kubelet() as kubelet:
            assert kubelet.pods == ()
        assert find_marked(pod.files.folder) == []
        assert len(harness.warnings) == 1
        assert file in harness.warnings[0]

    asyncio.run(check())


def test_a_pod_waits_for_its_configmap(harness: KubeletHarness) -> None:
    volumes = [{"name": "run", "configMap": {"name": "circles-run"}}]
    container = {
        "volumeMounts": [{"name": "run", "mountPath": "/run/spec"}],
        "env": [{"name": "RUN", "value": "/run/spec/run.json"}],
    }
    code = READY + "import os; pathlib.Path('/data/copy').write_text(open(os.environ['RUN']).read())"

    async def check() -> None:
        async with harness.kubelet() as kubelet:
            await kubelet.create(harness.python_pod(code, container=container, volumes=volumes))
            pod = kubelet.get(POD)
            assert pod is not None
            await harness.wait_until(lambda: "containerStatuses" in pod.value["status"])
            waiting = pod.value["status"]["containerStatuses"][0]["state"]["waiting"]
            assert waiting == {"reason": "ContainerCreating", "message": 'configmap "circles-run" not found'}
            harness.configs["circles-run"] = {"run.json": "{}"}
            kubelet.recheck_waiting_pods()
            await harness.wait_until(lambda: pod.ended)
            assert pod.phase is PodPhase.SUCCEEDED
            assert (harness.data / "copy").read_text() == "{}"

    asyncio.run(check())


class VanishingConfigs(dict[str, Mapping[str, str]]):
    """ConfigMaps that exist when the kubelet checks for them and are deleted before it reads them, once."""

    num_reads = 0

    def get(self, name: str, default: Any = None) -> Any:
        self.num_reads += 1
        return default if self.num_reads == 2 else super().get(name, default)


def test_a_configmap_that_vanishes_during_the_start_keeps_the_pod_waiting(harness: KubeletHarness) -> None:
    harness.configs = VanishingConfigs({"circles-run": {"run.json": "{}"}})
    volumes = [{"name": "run", "configMap": {"name": "circles-run"}}]

    async def check() -> None:
        async with harness.kubelet() as kubelet:
            await kubelet.create(harness.python_pod("pass", volumes=volumes))
            pod = kubelet.get(POD)
            assert pod is not None
            await harness.wait_until(lambda: "containerStatuses" in pod.value["status"])
            waiting = pod.value["status"]["containerStatuses"][0]["state"]["waiting"]
            assert waiting == {"reason": "ContainerCreating", "message": 'configmap "circles-run" not found'}
            kubelet.recheck_waiting_pods()
            await harness.wait_until(lambda: pod.ended)
            assert pod.phase is PodPhase.SUCCEEDED

    asyncio.run(check())


def test_pods_of_a_gang_use_disjoint_cores(harness: KubeletHarness) -> None:
    num_cores = len(os.sched_getaffinity(0))
    if num_cores < 2:
        pytest.skip("needs two cores")
    env = {"env": [{"name": "FINETUNE_NUM_NODES", "value": "2"}]}
    code = READY + "import os, json; pathlib.Path('/data/{0}').write_text(json.dumps(sorted(os.sched_getaffinity(0))))"

    async def check() -> None:
        async with harness.kubelet() as kubelet:
            for rank in (0, 1):
                await kubelet.create(harness.python_pod(code.format(rank), name=f"circles-a1-n{rank}", container=env))
            await harness.wait_until(lambda: all(pod.ended for pod in kubelet.pods))
            first, second = (set(json.loads((harness.data / str(rank)).read_text())) for rank in (0, 1))
            assert first.isdisjoint(second)
            assert len(first) == len(second) == num_cores // 2

    asyncio.run(check())


def test_a_pod_waits_for_the_cores_of_the_previous_attempt(harness: KubeletHarness) -> None:
    async def check() -> None:
        async with harness.kubelet() as kubelet:
            first = await started(harness, kubelet, SAVES_ON_SIGTERM)
            await kubelet.create(harness.python_pod("pass", name="circles-a2-n0"))
            second = kubelet.get("circles-a2-n0")
            assert second is not None
            await harness.wait_until(lambda: "containerStatuses" in second.value["status"])
            waiting = second.value["status"]["containerStatuses"][0]["state"]["waiting"]
            assert waiting["reason"] == "Unschedulable"
            assert not second.ended
            await kubelet.delete(first.name, first.uid)
            await harness.wait_until(lambda: second.ended)
            assert second.phase is PodPhase.SUCCEEDED

    asyncio.run(check())


@pytest.mark.parametrize(
    ("command", "code", "text"),
    [(["/nowhere/trainer"], 127, "/nowhere/trainer"), (["/"], 126, "/"), ([], 128, "no command")],
)
def test_a_failed_start_reports_the_cause(harness: KubeletHarness, command: list[str], code: int, text: str) -> None:
    async def check() -> None:
        async with harness.kubelet() as kubelet:
            await kubelet.create(harness.python_pod("", container={"command": command}))
            await harness.wait_until(lambda: (pod := kubelet.get(POD)) is not None and pod.ended)
            pod = kubelet.get(POD)
            assert pod is not None
            assert terminated_state(pod)["exitCode"] == code
            assert text in terminated_state(pod)["message"]

    asyncio.run(check())


def test_a_pod_may_change_while_it_is_written(harness: KubeletHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[object] = []
    monkeypatch.setattr(
        "finetune_operator.cluster.local.kubelet.kubelet.write_json", lambda path, value: written.append(value)
    )

    async def check() -> None:
        async with harness.kubelet() as kubelet:
            await kubelet.create(harness.python_pod("pass"))
            pod = kubelet.get(POD)
            assert pod is not None
            assert written
            assert all(value is not pod.value for value in written)
            pod.value["status"]["new"] = "value"
            assert "new" not in str(written[0])

    asyncio.run(check())
