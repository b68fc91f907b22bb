"""`finetune run` with real processes: complete runs, lost pods, interrupts and the kill of the command itself."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time

import pytest

from finetune_operator.cli.drive import REPEAT_SECONDS, StopRequests
from finetune_operator.cluster.local import jobs
from tests.cli.harness import FINETUNE, KEY, PATIENCE_SECONDS, CliHarness


def summary(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()[-1]


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for the exit of a run and return its output."""
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    return output


def test_an_undisturbed_run_succeeds(harness: CliHarness) -> None:
    last = summary(harness.run())
    assert last.startswith("circles Succeeded in ")
    assert "40/40 steps, 0 restarts (0 preemptions, 0 failures), 0 steps lost; outputs in " in last
    assert harness.saved_step() == 40
    again = harness.run()
    assert again.returncode == 0
    assert "circles has already Succeeded" in again.stdout
    assert "finetune delete circles" in again.stdout


def test_a_preemption_notice_loses_no_step(harness: CliHarness) -> None:
    last = summary(harness.run("--preempt", "rank=1,at-step=15"))
    assert "1 restart (1 preemption, 0 failures), 0 steps lost" in last
    first = harness.status()["attempts"][0]
    assert first["reason"] == "TerminationByKubelet"
    assert first["rank"] == 1
    assert first["toStep"] >= 15


def test_a_killed_pod_costs_at_most_a_checkpoint_interval(harness: CliHarness) -> None:
    summary(harness.run("--kill", "rank=0,at-step=25"))
    status = harness.status()
    assert (status["preemptions"], status["failures"]) == (1, 0)
    assert status["attempts"][0]["reason"] == "PodLost"
    # The kill happens at step 25 or, on a busy machine, a little later: possibly just after a checkpoint.
    assert 0 <= status["lostSteps"] <= 10


def test_two_faults_by_state_and_by_step(harness: CliHarness) -> None:
    harness.set_rank_arguments("--step-seconds", "0.02")
    summary(harness.run("--kill", "rank=1,at-state=Training", "--preempt", "rank=0,at-step=20"))
    assert harness.status()["attempt"] == 3


def test_an_elastic_job_shrinks_and_grows_back(harness: CliHarness) -> None:
    topology = harness.document["spec"]["topology"]
    topology |= {"minNodes": 1, "maxNodes": topology.pop("nodes")}
    harness.document["spec"]["recovery"] = {"shrinkAfter": "1s", "noticeSeconds": 30}
    harness.set_rank_arguments("--steps", "600", "--step-seconds", "0.01")
    last = summary(harness.run("--room", "nodes=1,at-step=20", "--room", "nodes=2,at-step=60"))
    assert "0 steps lost" in last
    attempts = harness.status()["attempts"]
    assert [entry["reason"] for entry in attempts] == ["TerminationByKubelet", "Shrunk", "Grown", "Finished"]
    assert [entry.get("nodes", 2) for entry in attempts] == [2, 2, 1, 2]
    # Each of the last attempts starts exactly at the last step of an earlier one.
    assert [entry.get("fromStep") for entry in attempts[2:]] == [attempts[0]["toStep"], attempts[2]["toStep"]]


def test_a_failing_rank_counts_as_failure_and_its_output_is_shown(harness: CliHarness) -> None:
    harness.document["spec"]["recovery"] = {"maxFailures": 1}
    harness.set_rank_arguments("--fail-at", "5")
    result = harness.run()
    assert result.returncode == 1
    assert "step 5 failed on purpose" in result.stdout
    assert "finetune logs circles" in result.stdout
    status = harness.status()
    assert status["phase"] == "Failed"
    assert status["failures"] == 2
    assert "To continue after its cause is fixed: finetune run" in result.stdout


def test_the_same_command_continues_a_failed_job(harness: CliHarness) -> None:
    harness.document["spec"]["recovery"] = {"maxFailures": 0}
    harness.set_rank_arguments("--fail-at", "15", "--fail-with", "64")
    assert harness.run().returncode == 1
    assert harness.status()["phase"] == "Failed"
    harness.set_rank_arguments()
    result = harness.run()
    assert result.returncode == 0, result.stdout
    assert "circles Failed before: " in result.stdout
    assert "circles continues from step " in result.stdout
    status = harness.status()
    assert (status["phase"], status["attempt"]) == ("Succeeded", 2)
    assert status["attempts"][1]["fromStep"] > 0


@pytest.mark.parametrize(("how", "trace"), [("stop", "T (stopped)"), ("deadlock", "in hang")])
def test_a_hung_rank_is_named_and_its_stack_is_saved(harness: CliHarness, how: str, trace: str) -> None:
    harness.document["spec"]["recovery"] = {"hangTimeout": "2s"}
    harness.set_rank_arguments("--hang-at", "15", "--hang", how, "--rank", "1")
    assert "1 restart (0 preemptions, 1 failure)" in summary(harness.run())
    first, second = harness.status()["attempts"]
    assert (first["reason"], first["rank"], first["pod"]) == ("Hang", 1, "circles-a1-n1")
    # The pod that waits for the hung rank is kept, and only restarts its ranks.
    assert second["podAttempts"] == [1, 2]
    job = harness.job()
    assert job is not None
    folder = jobs.storage_folder(harness.home, job)
    assert f"{folder.parent.name}/{folder.name}/hangs/attempt-1" in first["message"]
    assert trace in (folder / "hangs/attempt-1/rank-1.txt").read_text()
    assert "agree_to_stop" in (folder / "hangs/attempt-1/rank-0.txt").read_text()


def test_a_configuration_error_ends_the_job_at_once(harness: CliHarness) -> None:
    harness.set_rank_arguments("--fail-at", "1", "--fail-with", "64")
    assert harness.run().returncode == 1
    assert harness.status()["attempt"] == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_saves_and_the_same_command_resumes(harness: CliHarness, number: signal.Signals) -> None:
    harness.set_rank_arguments("--step-seconds", "0.05", "--save-every", "1000")
    process = harness.start()
    harness.wait_for_step(3)
    process.send_signal(number)
    output = finish(process)
    assert process.returncode == 130, output
    saved = harness.saved_step()
    assert f"circles is suspended at step {saved}, with the state saved" in output
    assert f"to resume: finetune run {harness.manifest}" in output
    assert harness.status()["phase"] == "Suspended"
    assert "0 restarts (0 preemptions, 0 failures), 0 steps lost" in summary(harness.run())
    assert harness.status()["attempts"][1]["fromStep"] == saved


def test_a_second_interrupt_kills_the_pods(harness: CliHarness) -> None:
    harness.set_rank_arguments("--ignore-sigterm", "--steps", "100000")
    process = harness.start()
    harness.wait_for_step(3)
    harness.wait_until(lambda: harness.status()["phase"] == "Running")
    process.send_signal(signal.SIGINT)
    harness.wait_until(lambda: harness.status()["phase"] != "Running" or harness.status()["reason"] == "Suspending")
    # Within a second of the first signal, another one belongs to the same request.
    second = time.monotonic() + REPEAT_SECONDS
    harness.wait_until(lambda: time.monotonic() >= second)
    process.send_signal(signal.SIGINT)
    output = finish(process)
    assert process.returncode == 130, output
    assert harness.processes() == []


def test_one_request_that_arrives_as_two_signals_still_saves(harness: CliHarness) -> None:
    harness.set_rank_arguments("--step-seconds", "0.05", "--save-every", "1000")
    process = harness.start()
    harness.wait_for_step(3)
    # Two kinds, because two pending signals of one kind are delivered only once.
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGHUP)
    output = finish(process)
    assert process.returncode == 130, output
    assert "killing the ranks" not in output
    assert f"circles is suspended at step {harness.saved_step()}, with the state saved" in output


def test_repeated_signals_are_one_request() -> None:
    times = iter((10.0, 10.0, 10.9, 11.0, 11.5, 12.5))
    requests = StopRequests(lambda: next(times))
    assert [requests.is_new() for _ in range(6)] == [True, False, False, True, False, True]


def test_pods_outlive_their_runner_and_are_adopted(harness: CliHarness) -> None:
    harness.set_rank_arguments("--step-seconds", "0.05", "--steps", "60", "--save-every", "1")
    process = harness.start()
    harness.wait_for_step(3)
    process.kill()
    finish(process)
    saved = harness.saved_step()
    harness.wait_until(lambda: harness.saved_step() > saved + 3)
    assert "0 restarts" in summary(harness.run())
    assert len(harness.status()["attempts"]) == 1


def test_pods_are_preempted_if_the_coordinator_changes_its_port(harness: CliHarness) -> None:
    harness.set_rank_arguments("--step-seconds", "0.05", "--steps", "60")
    process = harness.start()
    harness.wait_for_step(3)
    process.kill()
    finish(process)
    port = json.loads(harness.home.job(KEY).endpoint.read_text())["coordinator"]
    with socket.create_server(("127.0.0.1", port)):
        assert "1 restart (1 preemption, 0 failures), 0 steps lost" in summary(harness.run())


def test_the_next_run_reads_an_end_that_happened_without_a_runner(harness: CliHarness) -> None:
    process = harness.start()
    harness.wait_for_step(3)
    process.kill()
    finish(process)
    harness.wait_until(lambda: harness.processes() == [])
    assert harness.saved_step() == 40
    summary(harness.run())
    assert len(harness.status()["attempts"]) == 1


def test_a_kill_of_all_processes_counts_as_preemption(harness: CliHarness) -> None:
    harness.set_rank_arguments("--step-seconds", "0.05")
    process = harness.start()
    harness.wait_for_step(12)
    process.kill()
    harness.kill_pods()
    finish(process)
    assert "1 restart (1 preemption, 0 failures)" in summary(harness.run())
    assert harness.status()["attempts"][1]["fromStep"] >= 10


def test_a_second_run_of_a_running_job_is_refused(harness: CliHarness) -> None:
    harness.set_rank_arguments("--steps", "100000")
    first = harness.start()
    harness.wait_for_step(1)
    second = harness.run()
    assert second.returncode == 2
    assert f"process {first.pid} is already running job circles" in second.stderr
    first.send_signal(signal.SIGINT)
    finish(first)
    assert first.returncode == 130


def test_delete_stops_and_deletes_a_running_job(harness: CliHarness) -> None:
    harness.set_rank_arguments("--steps", "100000")
    process = harness.start()
    harness.wait_for_step(11)
    folder = harness.home.storage
    assert list(folder.rglob("step"))
    result = harness.call("delete", KEY.name)
    finish(process)
    assert result.returncode == 0, result.stderr
    assert f"waiting for process {process.pid} to save and stop" in result.stdout
    assert "deleting its checkpoints" in result.stdout
    assert result.stdout.endswith('finetunejob "circles" deleted\n')
    assert process.returncode == 130
    assert not list(folder.rglob("step"))
    assert not harness.home.job(KEY).path.exists()
    assert harness.call("get").stderr.startswith("No jobs")


def test_delete_kills_the_pods_of_a_killed_runner(harness: CliHarness) -> None:
    harness.set_rank_arguments("--steps", "100000")
    process = harness.start()
    harness.wait_for_step(1)
    process.kill()
    finish(process)
    assert harness.processes()
    assert harness.call("delete", KEY.name).returncode == 0
    assert harness.processes() == []


def test_a_forbidden_edit_is_refused(harness: CliHarness) -> None:
    harness.set_rank_arguments("--fail-at", "5")
    harness.document["spec"]["recovery"] = {"maxFailures": 0}
    harness.write()
    assert harness.run().returncode == 1
    harness.document["spec"]["training"]["learningRate"] = 0.5
    harness.write()
    result = harness.run()
    assert result.returncode == 2
    assert "spec.training.learningRate is unset and would become 0.5" in result.stderr
    assert "finetune delete circles" in result.stderr


def test_an_interrupted_job_accepts_a_new_failure_budget(harness: CliHarness) -> None:
    harness.set_rank_arguments("--step-seconds", "0.05")
    process = harness.start()
    harness.wait_for_step(2)
    process.send_signal(signal.SIGINT)
    finish(process)
    harness.document["spec"]["recovery"] = {"maxFailures": 7}
    harness.write()
    summary(harness.run())
    job = harness.job()
    assert job is not None
    assert job.spec.recovery.max_failures == 7


def test_set_overrides_the_manifest(harness: CliHarness) -> None:
    summary(harness.run("--set", "training.learningRate=0.5", "--set", "topology.nodes=1"))
    job = harness.job()
    assert job is not None
    assert job.spec.training.learning_rate == 0.5
    assert job.status.nodes == "0/1"


def test_a_closed_pipe_does_not_end_the_job(harness: CliHarness) -> None:
    with subprocess.Popen(
        [FINETUNE, "run", str(harness.manifest), "--home", str(harness.home.path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(PATIENCE_SECONDS) == 0
    assert harness.saved_step() == 40


def test_no_temporary_files_remain(harness: CliHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = harness.folder / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    summary(harness.run("--kill", "rank=0,at-step=15"))
    assert list(temporary.iterdir()) == []
