"""The Python client, on a real API server with an operator; the examples of the documentation are executed."""

from __future__ import annotations

import asyncio
import re
import threading
from pathlib import Path

import pytest

from finetune_contract.phase import Phase
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.validate import InvalidJob
from finetune_operator.client import AsyncFineTuneJobs, FineTuneJobs, JobFailedError, JobNotFoundError
from testing.controlplane.process import wait_for
from testing.operator.harness import Jobs, build_job, running
from tests.operator.conftest import NewOperator, all_run

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def end_pods(jobs: Jobs, code: int) -> None:
    """Wait until all pods run, and report the end of their containers, as a kubelet would."""
    wait_for("the pods run", lambda: all_run(jobs))
    jobs.wait_phase("circles", "Running")
    for name in jobs.pods():
        state = {"terminated": {"exitCode": code, "finishedAt": "2026-01-01T00:00:00Z"}}
        phase = "Failed" if code else "Succeeded"
        jobs.set_pod_status(name, {"phase": phase, "containerStatuses": [{"name": "trainer", "state": state}]})


@pytest.fixture
def kubeconfig(jobs: Jobs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return a kubeconfig whose context has the namespace of the test, and make it the default."""
    text = jobs.control_plane.kubeconfig.read_text(encoding="utf-8")
    path = tmp_path / "kubeconfig"
    path.write_text(text.replace('"namespace": "default"', f'"namespace": "{jobs.namespace}"'), encoding="utf-8")
    monkeypatch.setenv("KUBECONFIG", str(path))
    return path


@pytest.mark.cluster
def test_example_runs_and_the_asynchronous_one_follows_the_job(
    jobs: Jobs, new_operator: NewOperator, kubeconfig: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = EXAMPLES[0].replace('jobs.wait("circles")', 'jobs.wait("circles", timeout_seconds=120)')
    with running(new_operator()):
        player = threading.Thread(target=end_pods, args=(jobs, 0))
        player.start()
        exec(compile(example, str(PAGE), "exec"), {})
        player.join()
        assert "Succeeded" in capsys.readouterr().out
        exec(compile(EXAMPLES[2], str(PAGE), "exec"), {})
        assert "Succeeded" in capsys.readouterr().out
    with FineTuneJobs(kubeconfig=kubeconfig) as client:
        assert client.namespace == jobs.namespace
        assert client.status("circles").phase is Phase.SUCCEEDED
        assert [job.metadata.name for job in client.list()] == ["circles"]
        assert client.list("team=a") == ()
        assert client.suspend("circles").spec.suspend
        client.delete("circles")
        client.delete("circles")
        wait_for("the job is deleted", lambda: not client.list())
        with pytest.raises(JobNotFoundError, match="no FineTuneJob circles"):
            client.wait("circles")


@pytest.mark.cluster
def test_failures_deletions_and_invalid_manifests_are_errors(jobs: Jobs, kubeconfig: Path) -> None:
    async def test() -> None:
        async with AsyncFineTuneJobs(jobs.namespace, kubeconfig=kubeconfig) as client:
            with pytest.raises(InvalidJob, match=r"spec\.training"):
                await client.create({**build_job("circles"), "spec": {"model": {"base": "base"}}})
            assert await client.list() == ()
            created = await client.create(FineTuneJob.model_validate(build_job("circles")))
            assert created.metadata.uid
            assert created.spec.topology.nodes == 2
            with pytest.raises(TimeoutError):
                await client.wait("circles", timeout_seconds=0.2)
            failing = asyncio.create_task(client.wait("circles"))
            status = {"phase": "Failed", "reason": "UserCode", "message": "it divides by zero"}
            await asyncio.to_thread(set_status, jobs, status)
            with pytest.raises(JobFailedError, match="circles has failed: UserCode: it divides by zero"):
                await failing
            assert (await client.wait("circles", until="Failed")).reason == "UserCode"
            deleted = asyncio.create_task(client.wait("circles", until=Phase.SUCCEEDED))
            await client.delete("circles")
            with pytest.raises((JobNotFoundError, JobFailedError)):
                await deleted

    asyncio.run(test())


def set_status(jobs: Jobs, status: dict[str, str]) -> None:
    path = f"/apis/finetune-operator.io/v1alpha1/namespaces/{jobs.namespace}/finetunejobs/circles/status"
    jobs.control_plane.api.patch(path, {"status": status})
