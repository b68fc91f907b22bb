"""`finetune run` with real processes: to the end, through losses, interrupts and its own death."""

from __future__ import annotations

import json
import signal
import socket
import subprocess

import pytest

from finetune_operator.cluster.local import jobs
from tests.cli.harness import FINETUNE, KEY, PATIENCE_SECONDS, Bed


def summary(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()[-1]


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a run's end and return what it wrote."""
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    return output


def test_undisturbed(bed: Bed) -> None:
    last = summary(bed.run())
    assert last.startswith("circles Succeeded in ")
    assert "40/40 steps, 0 restarts (0 preemptions, 0 failures), 0 steps lost; outputs in " in last
    assert bed.checkpoint() == 40
    again = bed.run()
    assert again.returncode == 0
    assert "circles has Succeeded already" in again.stdout
    assert "finetune delete circles" in again.stdout


def test_a_preempted_rank_loses_nothing(bed: Bed) -> None:
    last = summary(bed.run("--preempt", "rank=1,at-step=15"))
    assert "1 restart (1 preemption, 0 failures), 0 steps lost" in last
    first = bed.status()["attempts"][0]
    assert first["reason"] == "TerminationByKubelet"
    assert first["rank"] == 1
    assert first["toStep"] >= 15


def test_a_killed_pod_costs_at_most_a_checkpoint_interval(bed: Bed) -> None:
    summary(bed.run("--kill", "rank=0,at-step=25"))
    status = bed.status()
    assert (status["preemptions"], status["failures"]) == (1, 0)
    assert status["attempts"][0]["reason"] == "PodLost"
    # The kill comes at step 25 or, on a busy machine, a little later: perhaps just behind a checkpoint.
    assert 0 <= status["lostSteps"] <= 10


def test_faults_at_a_state_and_in_a_row(bed: Bed) -> None:
    bed.ranks("--step-seconds", "0.02")
    summary(bed.run("--kill", "rank=1,at-state=Training", "--preempt", "rank=0,at-step=20"))
    assert bed.status()["attempt"] == 3


def test_an_elastic_job_shrinks_and_grows_back(bed: Bed) -> None:
    topology = bed.document["spec"]["topology"]
    topology |= {"minNodes": 1, "maxNodes": topology.pop("nodes")}
    bed.document["spec"]["recovery"] = {"shrinkAfter": "1s", "noticeSeconds": 30}
    bed.ranks("--steps", "600", "--step-seconds", "0.01")
    last = summary(bed.run("--room", "nodes=1,at-step=20", "--room", "nodes=2,at-step=60"))
    assert "0 steps lost" in last
    attempts = bed.status()["attempts"]
    assert [entry["reason"] for entry in attempts] == ["TerminationByKubelet", "Shrunk", "Grown", "Finished"]
    assert [entry.get("nodes", 2) for entry in attempts] == [2, 2, 1, 2]
    # No sooner than the checkpoint of the one before, and not a step later.
    assert [entry.get("fromStep") for entry in attempts[2:]] == [attempts[0]["toStep"], attempts[2]["toStep"]]


def test_a_failing_rank_spends_failures_and_says_its_last_words(bed: Bed) -> None:
    bed.document["spec"]["recovery"] = {"maxFailures": 1}
    bed.ranks("--fail-at", "5")
    result = bed.run()
    assert result.returncode == 1
    assert "step 5 is not for me" in result.stdout
    assert "finetune logs circles" in result.stdout
    status = bed.status()
    assert status["phase"] == "Failed"
    assert status["failures"] == 2
    assert bed.run().returncode == 1


@pytest.mark.parametrize(("how", "trace"), [("stop", "T (stopped)"), ("deadlock", "in hang")])
def test_a_rank_that_stands_still_is_named_and_its_stack_is_kept(bed: Bed, how: str, trace: str) -> None:
    bed.document["spec"]["recovery"] = {"hangTimeout": "2s"}
    bed.ranks("--hang-at", "15", "--hang", how, "--rank", "1")
    assert "1 restart (0 preemptions, 1 failure)" in summary(bed.run())
    first, second = bed.status()["attempts"]
    assert (first["reason"], first["rank"], first["pod"]) == ("Hang", 1, "circles-a1-n1")
    # The one that waits for it is kept, and only starts its ranks anew.
    assert second["podAttempts"] == [1, 2]
    job = bed.job()
    assert job is not None
    folder = jobs.storage_folder(bed.home, job)
    assert f"{folder.parent.name}/{folder.name}/hangs/attempt-1" in first["message"]
    assert trace in (folder / "hangs/attempt-1/rank-1.txt").read_text()
    assert "agree_to_stop" in (folder / "hangs/attempt-1/rank-0.txt").read_text()


def test_a_configuration_error_ends_the_job_at_once(bed: Bed) -> None:
    bed.ranks("--fail-at", "1", "--fail-with", "64")
    assert bed.run().returncode == 1
    assert bed.status()["attempt"] == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_saves_and_the_same_command_goes_on(bed: Bed, number: signal.Signals) -> None:
    bed.ranks("--step-seconds", "0.02", "--save-every", "1000")
    process = bed.start()
    bed.until_step(3)
    process.send_signal(number)
    output = finish(process)
    assert process.returncode == 130, output
    saved = bed.checkpoint()
    assert f"circles is suspended at step {saved}, which is saved" in output
    assert f"finetune run {bed.manifest}" in output
    assert bed.status()["phase"] == "Suspended"
    assert "0 restarts (0 preemptions, 0 failures), 0 steps lost" in summary(bed.run())
    assert bed.status()["attempts"][1]["fromStep"] == saved


def test_a_second_interrupt_kills(bed: Bed) -> None:
    bed.ranks("--deaf", "--steps", "100000")
    process = bed.start()
    bed.until_step(3)
    # The second one is sent when the first was heard, for two that wait to be heard are one.
    bed.until(lambda: bed.status()["phase"] == "Running")
    process.send_signal(signal.SIGINT)
    bed.until(lambda: bed.status()["phase"] != "Running" or bed.status()["reason"] == "Suspending")
    process.send_signal(signal.SIGINT)
    output = finish(process)
    assert process.returncode == 130, output
    assert bed.processes() == []


def test_pods_outlive_their_runner_and_are_adopted(bed: Bed) -> None:
    bed.ranks("--step-seconds", "0.05", "--steps", "60", "--save-every", "1")
    process = bed.start()
    bed.until_step(3)
    process.kill()
    finish(process)
    alone = bed.checkpoint()
    bed.until(lambda: bed.checkpoint() > alone + 3)
    assert "0 restarts" in summary(bed.run())
    assert len(bed.status()["attempts"]) == 1


def test_pods_whose_coordinator_has_to_move_save_and_start_again(bed: Bed) -> None:
    bed.ranks("--step-seconds", "0.05", "--steps", "60")
    process = bed.start()
    bed.until_step(3)
    process.kill()
    finish(process)
    port = json.loads(bed.home.job(KEY).endpoint.read_text())["coordinator"]
    with socket.create_server(("127.0.0.1", port)):
        assert "1 restart (1 preemption, 0 failures), 0 steps lost" in summary(bed.run())


def test_an_end_that_nobody_saw_is_read(bed: Bed) -> None:
    process = bed.start()
    bed.until_step(3)
    process.kill()
    finish(process)
    bed.until(lambda: bed.processes() == [])
    assert bed.checkpoint() == 40
    summary(bed.run())
    assert len(bed.status()["attempts"]) == 1


def test_the_whole_tree_killed(bed: Bed) -> None:
    bed.ranks("--step-seconds", "0.02")
    process = bed.start()
    bed.until_step(12)
    process.kill()
    bed.kill_pods()
    finish(process)
    assert "1 restart (1 preemption, 0 failures)" in summary(bed.run())
    assert bed.status()["attempts"][1]["fromStep"] >= 10


def test_two_runs_of_one_job(bed: Bed) -> None:
    bed.ranks("--steps", "100000")
    first = bed.start()
    bed.until_step(1)
    second = bed.run()
    assert second.returncode == 2
    assert f"job circles is being run by process {first.pid}" in second.stderr
    first.send_signal(signal.SIGINT)
    finish(first)
    assert first.returncode == 130


def test_delete_stops_a_running_job_and_removes_it(bed: Bed) -> None:
    bed.ranks("--steps", "100000")
    process = bed.start()
    bed.until_step(3)
    folder = bed.home.storage
    assert list(folder.rglob("*"))
    result = bed.call("delete", KEY.name)
    finish(process)
    assert result.returncode == 0, result.stderr
    assert "asking process" in result.stdout
    assert "removing its checkpoints" in result.stdout
    assert result.stdout.endswith('finetunejob "circles" deleted\n')
    assert process.returncode == 130
    assert not list(folder.rglob("step"))
    assert not bed.home.job(KEY).path.exists()
    assert bed.call("get").stderr.startswith("No jobs")


def test_delete_of_a_job_whose_runner_died(bed: Bed) -> None:
    bed.ranks("--steps", "100000")
    process = bed.start()
    bed.until_step(1)
    process.kill()
    finish(process)
    assert bed.processes()
    assert bed.call("delete", KEY.name).returncode == 0
    assert bed.processes() == []


def test_what_may_change_and_what_may_not(bed: Bed) -> None:
    bed.ranks("--fail-at", "5")
    bed.document["spec"]["recovery"] = {"maxFailures": 0}
    bed.write()
    assert bed.run().returncode == 1
    bed.document["spec"]["training"]["learningRate"] = 0.5
    bed.write()
    result = bed.run()
    assert result.returncode == 2
    assert "spec.training.learningRate is 0.0001 and would become 0.5" in result.stderr
    assert "finetune delete circles" in result.stderr


def test_a_running_job_takes_a_new_budget(bed: Bed) -> None:
    bed.ranks("--step-seconds", "0.02")
    process = bed.start()
    bed.until_step(2)
    process.send_signal(signal.SIGINT)
    finish(process)
    bed.document["spec"]["recovery"] = {"maxFailures": 7}
    bed.write()
    summary(bed.run())
    job = bed.job()
    assert job is not None
    assert job.spec.recovery.max_failures == 7


def test_set_overrides_the_manifest(bed: Bed) -> None:
    summary(bed.run("--set", "training.learningRate=0.5", "--set", "topology.nodes=1"))
    job = bed.job()
    assert job is not None
    assert job.spec.training.learning_rate == 0.5
    assert job.status.nodes == "0/1"


def test_a_reader_that_leaves_does_not_end_the_job(bed: Bed) -> None:
    with subprocess.Popen(
        [FINETUNE, "run", str(bed.manifest), "--home", str(bed.home.path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(PATIENCE_SECONDS) == 0
    assert bed.checkpoint() == 40


def test_nothing_is_left_in_the_folder_for_temporary_files(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = bed.folder / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    summary(bed.run("--kill", "rank=0,at-step=15"))
    assert list(temporary.iterdir()) == []
