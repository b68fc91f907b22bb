"""Pods as processes: start, notice, end, death, adoption."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest

from finetune_operator.cluster.local.kubelet.pod import Pod
from finetune_operator.cluster.local.kubelet.processes import find_marked, is_alive
from finetune_operator.plan.model.types import PodPhase
from tests.local.harness import KEY, READY, Bed, terminated

POD = "circles-a1-n0"
SAVES_ON_NOTICE = (
    READY + "signal.signal(signal.SIGTERM, lambda *_: (mark('saved'), sys.exit(75))); mark('up'); signal.pause()"
)
DEAF = READY + "signal.signal(signal.SIGTERM, signal.SIG_IGN); mark('up'); time.sleep(600)"


@pytest.fixture
def bed(tmp_path: Path) -> Bed:
    return Bed(tmp_path)


async def started(bed: Bed, kubelet: object, code: str) -> Pod:
    await kubelet.create(bed.python(code))  # type: ignore[attr-defined]
    await bed.until_file("up")
    pod = kubelet.get(POD)  # type: ignore[attr-defined]
    assert isinstance(pod, Pod)
    await bed.until(lambda: pod.phase is PodPhase.RUNNING)
    return pod


def test_exit_code_log_and_last_words(bed: Bed) -> None:
    async def check() -> None:
        async with bed.kubelet() as kubelet:
            code = "import sys; print('hello'); open('/dev/termination-log', 'w'); sys.exit(3)"
            await kubelet.create(bed.python(code.replace("/dev/termination-log", "/data/x")))
            await bed.until(lambda: (pod := kubelet.get(POD)) is not None and pod.ended)
            pod = kubelet.get(POD)
            assert pod is not None
            assert pod.phase is PodPhase.FAILED
            assert terminated(pod)["exitCode"] == 3
            # It left no termination message: the end of its log stands in for it.
            assert terminated(pod)["message"] == "hello"
            assert (bed.home.job(KEY).logs / f"{POD}.log").read_text() == "hello\n"

    asyncio.run(check())


def test_deletion_gives_notice_and_the_end_can_be_read(bed: Bed) -> None:
    async def check() -> None:
        async with bed.kubelet() as kubelet:
            pod = await started(bed, kubelet, SAVES_ON_NOTICE)
            await kubelet.preempt(POD, "TerminationByKubelet", "the node shuts down")
            await bed.until(lambda: pod.ended)
            assert (bed.data / "saved").exists()
            assert terminated(pod)["exitCode"] == 75
            conditions = {condition["type"]: condition for condition in pod.value["status"]["conditions"]}
            assert conditions["DisruptionTarget"]["reason"] == "TerminationByKubelet"
            assert kubelet.get(POD) is pod
            await kubelet.collect(frozenset({pod.uid}))
            assert kubelet.get(POD) is None
            assert not pod.files.folder.exists()

    asyncio.run(check())


def test_a_deaf_pod_is_killed_when_its_grace_period_is_over(bed: Bed) -> None:
    async def check() -> None:
        async with bed.kubelet() as kubelet:
            pod = await started(bed, kubelet, DEAF)
            await kubelet.delete(POD, pod.uid, grace_seconds=1)
            await bed.until(lambda: pod.ended)
            assert terminated(pod)["exitCode"] == 128 + signal.SIGKILL

    asyncio.run(check())


def test_nothing_outlives_the_first_process(bed: Bed) -> None:
    """A grandchild in a session of its own, deaf to SIGTERM, goes when the pod's first process goes."""
    code = (
        READY + "import subprocess; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], "
        "start_new_session=True); mark('up'); signal.pause()"
    )

    async def check() -> None:
        async with bed.kubelet() as kubelet:
            pod = await started(bed, kubelet, code)
            assert len(find_marked(pod.files.folder)) == 3  # shim, container, grandchild
            await kubelet.delete(POD, pod.uid)
            await bed.until(lambda: pod.ended)
            assert find_marked(pod.files.folder) == []

    asyncio.run(check())


def test_sudden_death_takes_the_pod_with_its_node(bed: Bed) -> None:
    async def check() -> None:
        async with bed.kubelet() as kubelet:
            pod = await started(bed, kubelet, SAVES_ON_NOTICE)
            await kubelet.vanish(POD)
            assert kubelet.pods == ()
            assert find_marked(pod.files.folder) == []
            assert not (bed.data / "saved").exists()

    asyncio.run(check())


def test_a_shim_that_is_killed_takes_its_container_along(bed: Bed) -> None:
    async def check() -> None:
        async with bed.kubelet() as kubelet:
            pod = await started(bed, kubelet, DEAF)
            assert pod.processes is not None
            os.kill(pod.processes.shim.pid, signal.SIGKILL)
            await bed.until(lambda: kubelet.get(POD) is None)
            assert not is_alive(pod.processes.container)

    asyncio.run(check())


def test_living_pods_are_adopted(bed: Bed) -> None:
    async def check() -> None:
        async with bed.kubelet() as kubelet:
            first = await started(bed, kubelet, SAVES_ON_NOTICE)
        async with bed.kubelet() as kubelet:
            pod = kubelet.get(POD)
            assert pod is not None
            assert pod is not first
            assert pod.processes == first.processes
            await kubelet.delete(POD, pod.uid)
            await bed.until(lambda: pod.ended)
            assert terminated(pod)["exitCode"] == 75

    asyncio.run(check())


def test_an_end_that_nobody_watched_is_read(bed: Bed) -> None:
    async def check() -> None:
        async with bed.kubelet() as kubelet:
            code = READY + "mark('up')\nwhile not pathlib.Path('/data/go').exists(): time.sleep(0.005)\nsys.exit(7)"
            pod = await started(bed, kubelet, code)
        (bed.data / "go").touch()
        async with asyncio.timeout(30):
            while not pod.files.exit.exists():  # noqa: ASYNC110  another process's file
                await asyncio.sleep(0.005)
        async with bed.kubelet() as kubelet:
            adopted = kubelet.get(POD)
            assert adopted is not None
            await bed.until(lambda: adopted.ended)
            assert terminated(adopted)["exitCode"] == 7

    asyncio.run(check())


def test_a_pod_that_died_with_its_runner_is_gone(bed: Bed) -> None:
    async def check() -> None:
        async with bed.kubelet() as kubelet:
            pod = await started(bed, kubelet, DEAF)
        assert pod.processes is not None
        os.kill(pod.processes.shim.pid, signal.SIGKILL)
        os.waitpid(pod.processes.shim.pid, 0)  # noqa: ASYNC222  it was killed
        async with bed.kubelet() as kubelet:
            assert kubelet.pods == ()
        assert not pod.files.folder.exists()

    asyncio.run(check())


def test_a_deleted_pod_is_killed_in_time_by_the_next_runner(bed: Bed) -> None:
    async def check() -> None:
        async with bed.kubelet() as kubelet:
            pod = await started(bed, kubelet, DEAF)
            await kubelet.delete(POD, pod.uid, grace_seconds=1)
        async with bed.kubelet() as kubelet:
            adopted = kubelet.get(POD)
            assert adopted is not None
            assert adopted.deleted
            await bed.until(lambda: adopted.ended)

    asyncio.run(check())


@pytest.mark.parametrize("garbage", [b"", b"{", b"\xff\xfe", b"[]", b'{"metadata": {}}', b"null"])
@pytest.mark.parametrize("file", ["pod.json", "process.json"])
def test_broken_files_of_a_pod_cost_the_pod_only(bed: Bed, garbage: bytes, file: str) -> None:
    async def check() -> None:
        async with bed.kubelet() as kubelet:
            pod = await started(bed, kubelet, DEAF)
        (pod.files.folder / file).write_bytes(garbage)
        async with bed.kubelet() as kubelet:
            assert kubelet.pods == ()
        assert find_marked(pod.files.folder) == []
        assert len(bed.warnings) == 1
        assert file in bed.warnings[0]

    asyncio.run(check())


def test_a_pod_waits_for_its_config(bed: Bed) -> None:
    volumes = [{"name": "run", "configMap": {"name": "circles-run"}}]
    container = {
        "volumeMounts": [{"name": "run", "mountPath": "/run/spec"}],
        "env": [{"name": "RUN", "value": "/run/spec/run.json"}],
    }
    code = READY + "import os; pathlib.Path('/data/copy').write_text(open(os.environ['RUN']).read())"

    async def check() -> None:
        async with bed.kubelet() as kubelet:
            await kubelet.create(bed.python(code, container=container, volumes=volumes))
            pod = kubelet.get(POD)
            assert pod is not None
            await bed.until(lambda: "containerStatuses" in pod.value["status"])
            waiting = pod.value["status"]["containerStatuses"][0]["state"]["waiting"]
            assert waiting == {"reason": "ContainerCreating", "message": 'configmap "circles-run" not found'}
            bed.configs["circles-run"] = {"run.json": "{}"}
            kubelet.look_for_startable()
            await bed.until(lambda: pod.ended)
            assert pod.phase is PodPhase.SUCCEEDED
            assert (bed.data / "copy").read_text() == "{}"

    asyncio.run(check())


def test_pods_of_a_gang_have_cores_of_their_own(bed: Bed) -> None:
    num_cores = len(os.sched_getaffinity(0))
    if num_cores < 2:
        pytest.skip("one core cannot be shared out")
    env = {"env": [{"name": "FINETUNE_NUM_NODES", "value": "2"}]}
    code = READY + "import os, json; pathlib.Path('/data/{0}').write_text(json.dumps(sorted(os.sched_getaffinity(0))))"

    async def check() -> None:
        async with bed.kubelet() as kubelet:
            for rank in (0, 1):
                await kubelet.create(bed.python(code.format(rank), name=f"circles-a1-n{rank}", container=env))
            await bed.until(lambda: all(pod.ended for pod in kubelet.pods))
            first, second = (set(json.loads((bed.data / str(rank)).read_text())) for rank in (0, 1))
            assert first.isdisjoint(second)
            assert len(first) == len(second) == num_cores // 2

    asyncio.run(check())


def test_a_pod_waits_for_the_cores_of_the_attempt_before(bed: Bed) -> None:
    async def check() -> None:
        async with bed.kubelet() as kubelet:
            first = await started(bed, kubelet, SAVES_ON_NOTICE)
            await kubelet.create(bed.python("pass", name="circles-a2-n0"))
            second = kubelet.get("circles-a2-n0")
            assert second is not None
            await bed.until(lambda: "containerStatuses" in second.value["status"])
            waiting = second.value["status"]["containerStatuses"][0]["state"]["waiting"]
            assert waiting["reason"] == "Unschedulable"
            assert not second.ended
            await kubelet.delete(first.name, first.uid)
            await bed.until(lambda: second.ended)
            assert second.phase is PodPhase.SUCCEEDED

    asyncio.run(check())


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [(["/nowhere/trainer"], 127, "/nowhere/trainer"), (["/"], 126, "/"), ([], 128, "no command")],
)
def test_what_cannot_start_says_why(bed: Bed, command: list[str], code: int, words: str) -> None:
    async def check() -> None:
        async with bed.kubelet() as kubelet:
            await kubelet.create(bed.python("", container={"command": command}))
            await bed.until(lambda: (pod := kubelet.get(POD)) is not None and pod.ended)
            pod = kubelet.get(POD)
            assert pod is not None
            assert terminated(pod)["exitCode"] == code
            assert words in terminated(pod)["message"]

    asyncio.run(check())
