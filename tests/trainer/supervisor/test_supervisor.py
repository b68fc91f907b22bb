"""The supervisor over real processes: fake ranks that speak the contract, a real HTTP endpoint that records beats."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import RankState, Reply, Termination
from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import DatasetSpec, ModelSpec, TrainingSpec
from finetune_trainer.supervisor.cores import cgroup_quota
from finetune_trainer.supervisor.ranks import send_signal
from testing.controlplane.process import wait_for

DEADLINE_SECONDS = 20.0


class Endpoint:
    """Records beats and answers with what the test sets."""

    def __init__(self) -> None:
        self.beats: list[dict[str, Any]] = []
        self.tokens: list[str | None] = []
        self.reply = Reply()
        self.news = threading.Condition()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with endpoint.news:
                    endpoint.beats.append(json.loads(body))
                    endpoint.tokens.append(self.headers.get("Authorization"))
                    endpoint.news.notify_all()
                answer = endpoint.reply.to_json().encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def wait(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + DEADLINE_SECONDS
        with self.news:
            while True:
                for beat in self.beats:
                    if wanted(beat):
                        return beat
                assert self.news.wait(deadline - time.monotonic()), f"no such beat among {self.beats}"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    served = Endpoint()
    thread = threading.Thread(target=served.server.serve_forever, daemon=True)
    thread.start()
    yield served
    served.server.shutdown()
    served.server.server_close()


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path, endpoint: Endpoint) -> Iterator[Start]:
    """Start a supervisor whose ranks run the given Python text."""
    spec = RunSpec(
        namespace="default",
        job="circles",
        uid="1f0c3a2b-0000",
        model=ModelSpec(base="base"),
        dataset=DatasetSpec(source="data"),
        training=TrainingSpec(),
        global_batch=2,
    )
    (tmp_path / "run.json").write_text(spec.to_json())
    (tmp_path / "token").write_text("sesame\n")
    started: list[subprocess.Popen[str]] = []

    def run(text: str, ranks: int = 2, **extra: str) -> subprocess.Popen[str]:
        prelude = """
            import os, sys, json, signal, time
            rank = int(os.environ["RANK"])
            def report(**what):
                line = json.dumps({"rank": rank, **what}) + "\\n"
                os.write(int(os.environ["FINETUNE_REPORT_FD"]), line.encode())
        """
        code = textwrap.dedent(prelude) + textwrap.dedent(text)
        env = {
            **os.environ,
            "FINETUNE_RUN_SPEC": str(tmp_path / "run.json"),
            "FINETUNE_ATTEMPT": "3",
            "FINETUNE_POD_NAME": "circles-a3-n0",
            "FINETUNE_POD_UID": "uid-1",
            "FINETUNE_NODE_RANK": "1",
            "FINETUNE_NUM_NODES": "2",
            "FINETUNE_PROCESSES_PER_NODE": str(ranks),
            "FINETUNE_COORDINATOR_URL": endpoint.url,
            "FINETUNE_COORDINATOR_TOKEN": str(tmp_path / "token"),
            "FINETUNE_BEAT_SECONDS": "0.2",
            "FINETUNE_TERMINATION_LOG": str(tmp_path / "last-words"),
            **extra,
        }
        command = [sys.executable, "-m", "finetune_trainer.supervisor", "--", sys.executable, "-c", code]
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def last_words(tmp_path: Path) -> Termination:
    return Termination.model_validate_json((tmp_path / "last-words").read_text())


def test_ranks_get_torch_variables_and_their_own_cores(start: Start) -> None:
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"]
    process = start(f"print(json.dumps([[os.environ[n] for n in {names}], sorted(os.sched_getaffinity(0))]))")
    out, _ = process.communicate(timeout=DEADLINE_SECONDS)
    seen = sorted(json.loads(line.split("] ", 1)[1]) for line in out.splitlines())
    num_cores = len(os.sched_getaffinity(0))
    threads = str(max(1, num_cores // 2))
    assert [environment for environment, _ in seen] == [["2", "4", "0", "2", threads], ["3", "4", "1", "2", threads]]
    if num_cores % 2 == 0 and cgroup_quota() is None:
        assert not set(seen[0][1]) & set(seen[1][1])
    assert process.returncode == ExitCode.DONE


def test_reports_travel_in_beats_with_the_pods_token(start: Start, endpoint: Endpoint) -> None:
    process = start("report(state='Training', step=7, loss=0.5, warnings=['one']); report(state='Saving', step=8)")
    process.communicate(timeout=DEADLINE_SECONDS)
    beat = endpoint.beats[-1]
    assert {rank["state"] for rank in beat["ranks"]} == {RankState.DONE}
    assert [rank["step"] for rank in beat["ranks"]] == [8, 8]
    assert beat["ranks"][0]["loss"] == 0.5, "what a later report leaves out stays as it was"
    assert beat["ranks"][0]["warnings"] == ["one"]
    assert [b["sequence"] for b in endpoint.beats] == list(range(1, len(endpoint.beats) + 1))
    assert set(endpoint.tokens) == {"Bearer sesame"}


def test_a_change_is_told_at_once_and_a_step_at_the_next_beat(start: Start, endpoint: Endpoint) -> None:
    start("report(state='Loading'); report(state='Training', step=1); signal.pause()", FINETUNE_BEAT_SECONDS="3600")
    endpoint.wait(lambda beat: all(rank["state"] == "Training" for rank in beat["ranks"]))


def test_notice_reaches_all_ranks_and_they_have_their_time(start: Start, endpoint: Endpoint, tmp_path: Path) -> None:
    process = start(
        """
        def save(*_):
            time.sleep(1)  # longer than any patience but the pod's own
            sys.exit(75)
        signal.signal(signal.SIGTERM, save)
        report(state='Training', step=5)
        while True: signal.pause()
        """
    )
    endpoint.wait(lambda beat: all(rank["state"] == "Training" for rank in beat["ranks"]))
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE_SECONDS) == ExitCode.SAVED
    words = last_words(tmp_path)
    assert words.notice
    assert words.step == 5
    assert {end.exit_code for end in words.ends} == {ExitCode.SAVED}
    assert endpoint.wait(lambda beat: beat["notice"])


def test_the_first_bad_end_is_the_cause_and_carries_its_last_words(start: Start, tmp_path: Path) -> None:
    process = start(
        """
        if rank == 3:
            print("CUDA out of memory", file=sys.stderr); sys.exit(1)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(76))
        while True: signal.pause()
        """
    )
    assert process.wait(DEADLINE_SECONDS) == 1
    words = last_words(tmp_path)
    assert words.ends[0].rank == 3
    assert words.ends[0].exit_code == 1
    assert "CUDA out of memory" in words.ends[0].last_words


def test_a_killed_rank_ends_the_pod_with_137_even_if_its_peer_hangs(start: Start, endpoint: Endpoint) -> None:
    process = start(
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        report(state='Training', step=1, detail=str(os.getpid()))
        while True: signal.pause()
        """,
        FINETUNE_BEAT_SECONDS="0.05",
    )
    beat = endpoint.wait(lambda beat: all(rank.get("detail") for rank in beat["ranks"]))
    os.kill(int(beat["ranks"][0]["detail"]), signal.SIGKILL)
    assert process.wait(DEADLINE_SECONDS) == 128 + signal.SIGKILL


def test_ranks_die_with_their_supervisor(start: Start, endpoint: Endpoint) -> None:
    process = start("report(state='Training', detail=str(os.getpid())); signal.pause()", FINETUNE_BEAT_SECONDS="0.05")
    beat = endpoint.wait(lambda beat: all(rank.get("detail") for rank in beat["ranks"]))
    descriptors = [os.pidfd_open(int(rank["detail"])) for rank in beat["ranks"]]
    process.kill()
    for descriptor in descriptors:
        ready, _, _ = select.select([descriptor], [], [], DEADLINE_SECONDS)
        assert ready, "a rank outlived its supervisor"
        os.close(descriptor)


def test_training_goes_on_without_a_coordinator(start: Start) -> None:
    process = start("report(state='Training', step=1)", FINETUNE_COORDINATOR_URL="http://127.0.0.1:9")
    _, err = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == ExitCode.DONE
    assert err.count("training continues") == 1


def test_an_order_to_stop_is_a_notice(start: Start, endpoint: Endpoint) -> None:
    process = start("signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); report(state='Training'); signal.pause()")
    endpoint.wait(lambda beat: all(rank["state"] == "Training" for rank in beat["ranks"]))
    endpoint.reply = Reply.model_validate({"order": "SaveAndStop"})
    assert process.wait(DEADLINE_SECONDS) == ExitCode.SAVED


def test_what_ranks_that_stand_still_were_doing_is_kept(start: Start, endpoint: Endpoint, tmp_path: Path) -> None:
    process = start(
        """
        import faulthandler, threading
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        lock = threading.Lock()
        def take_it_twice():
            with lock, lock: pass
        def tell_when_it_is_stuck():
            while sys._current_frames()[threading.main_thread().ident].f_code.co_name != "take_it_twice": pass
            report(state='Training', step=7, detail=str(os.getpid()))
        if os.environ["FINETUNE_ATTEMPT"] == "3":
            if rank == 3:
                report(state='Training', step=7, detail=str(os.getpid()))
                os.kill(os.getpid(), signal.SIGSTOP)
            threading.Thread(target=tell_when_it_is_stuck, daemon=True).start()
            take_it_twice()
        """,
        FINETUNE_CHECKPOINT_DIR=str(tmp_path / "job"),
        **HOLD,
    )
    beat = endpoint.wait(lambda beat: all(rank["state"] == "Training" for rank in beat["ranks"]))
    pid = int(beat["ranks"][1]["detail"])
    wait_for("rank 3 stands still", lambda: ") T " in Path(f"/proc/{pid}/stat").read_text())
    # The new world comes at once: what was asked for is written before the ranks are ended.
    endpoint.reply = Reply.model_validate({"attempt": 4, "world": WORLD_4, "stacks": True})
    assert process.wait(DEADLINE_SECONDS) == ExitCode.DONE
    folder = tmp_path / "job" / "hangs" / "attempt-3"
    deadlocked, stopped = (folder / "rank-2.txt").read_text(), (folder / "rank-3.txt").read_text()
    assert "training at step 7" in deadlocked
    assert "in take_it_twice" in deadlocked
    assert "process state: T (stopped)" in stopped


LATE = """
        class Late:
            def __del__(self):
                # Python has taken its signal handlers away by now.
                report(state=LAST, detail="late")
                signal.pause()
        signal.signal(signal.SIGTERM, lambda *_: None)
        late = Late()
"""


@pytest.mark.parametrize(("state", "code"), [("Saved", ExitCode.SAVED), ("Done", ExitCode.DONE), ("Training", 143)])
def test_an_order_that_meets_a_rank_on_its_way_out(start: Start, endpoint: Endpoint, state: str, code: int) -> None:
    process = start(LATE.replace("LAST", repr(state)))
    endpoint.wait(lambda beat: all(rank.get("detail") == "late" for rank in beat["ranks"]))
    endpoint.reply = Reply.model_validate({"order": "SaveAndStop"})
    assert process.wait(DEADLINE_SECONDS) == code


def test_an_order_that_meets_a_rank_before_it_listens(start: Start, endpoint: Endpoint) -> None:
    process = start("report(state='Starting', detail='early'); signal.pause()", FINETUNE_BEAT_SECONDS="0.05")
    endpoint.wait(lambda beat: all(rank.get("detail") == "early" for rank in beat["ranks"]))
    endpoint.reply = Reply.model_validate({"order": "SaveAndStop"})
    assert process.wait(DEADLINE_SECONDS) == ExitCode.SAVED


def test_a_superseded_supervisor_stops(start: Start, endpoint: Endpoint) -> None:
    endpoint.reply = Reply(attempt=4)
    process = start("signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); signal.pause()")
    assert process.wait(DEADLINE_SECONDS) == ExitCode.SUPERSEDED


WORLD_4 = {"attempt": 4, "nodeRank": 0, "numNodes": 3, "masterAddr": "here", "masterPort": 7}
HOLD = {"FINETUNE_HOLD_SECONDS": "60", "FINETUNE_BEAT_SECONDS": "0.05"}


def test_after_a_lost_peer_the_ranks_start_anew_in_the_world_that_is_named(start: Start, endpoint: Endpoint) -> None:
    process = start(
        """
        if os.environ["FINETUNE_ATTEMPT"] == "3":
            sys.exit(76)
        names = ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "FINETUNE_NUM_NODES"]
        report(state='Training', detail=' '.join(os.environ[name] for name in names))
        """,
        **HOLD,
    )
    waiting = endpoint.wait(lambda beat: beat["waiting"])
    # The other one may still have been on its way in when it was told to stop.
    assert waiting["ends"][0]["exitCode"] == ExitCode.FABRIC
    endpoint.reply = Reply.model_validate({"attempt": 4, "world": WORLD_4})
    assert process.wait(DEADLINE_SECONDS) == ExitCode.DONE
    last = endpoint.beats[-1]
    assert (last["attempt"], last["nodeRank"], last["waiting"]) == (4, 0, False)
    assert {rank["detail"] for rank in last["ranks"]} == {"0 6 here 7 3", "1 6 here 7 3"}


def test_ranks_that_hang_are_ended_for_a_new_world(start: Start, endpoint: Endpoint) -> None:
    process = start(
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        report(state='Training')
        while os.environ["FINETUNE_ATTEMPT"] == "3": signal.pause()
        """,
        **HOLD,
    )
    endpoint.wait(lambda beat: all(rank["state"] == "Training" for rank in beat["ranks"]))
    endpoint.reply = Reply.model_validate({"attempt": 4, "world": WORLD_4})
    assert process.wait(DEADLINE_SECONDS) == ExitCode.DONE


def test_ranks_that_wait_for_a_lost_peer_in_vain_end_when_the_coordinator_says_so(
    start: Start, endpoint: Endpoint
) -> None:
    process = start(
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        report(state='Training')
        while os.environ["FINETUNE_ATTEMPT"] == "3": signal.pause()
        """,
        **HOLD,
    )
    endpoint.wait(lambda beat: all(rank["state"] == "Training" for rank in beat["ranks"]))
    endpoint.reply = Reply(attempt=3, peer_lost=True)
    waiting = endpoint.wait(lambda beat: beat["waiting"])
    assert {end["exitCode"] for end in waiting["ends"]} == {ExitCode.FABRIC}
    endpoint.reply = Reply.model_validate({"attempt": 4, "world": WORLD_4})
    assert process.wait(DEADLINE_SECONDS) == ExitCode.DONE


def test_a_supervisor_that_waits_leaves_on_notice(start: Start, endpoint: Endpoint, tmp_path: Path) -> None:
    process = start("sys.exit(76)", **HOLD)
    endpoint.wait(lambda beat: beat["waiting"])
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE_SECONDS) == ExitCode.FABRIC
    assert last_words(tmp_path).notice


def test_nobody_waits_for_a_world_where_nobody_answers(start: Start) -> None:
    process = start("sys.exit(76)", FINETUNE_COORDINATOR_URL="http://127.0.0.1:9", **HOLD)
    assert process.wait(DEADLINE_SECONDS) == ExitCode.FABRIC


def test_a_rank_that_failed_by_itself_ends_the_pod(start: Start, endpoint: Endpoint) -> None:
    process = start("sys.exit(1)", **HOLD)
    assert process.wait(DEADLINE_SECONDS) == 1
    assert not any(beat["waiting"] for beat in endpoint.beats)


def test_ordered_to_save_the_pod_waits_for_what_comes_after(start: Start, endpoint: Endpoint) -> None:
    process = start(
        """
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        report(state='Training')
        while os.environ["FINETUNE_ATTEMPT"] == "3": signal.pause()
        """,
        **HOLD,
    )
    endpoint.wait(lambda beat: all(rank["state"] == "Training" for rank in beat["ranks"]))
    endpoint.reply = Reply.model_validate({"order": "SaveAndStop"})
    saved = endpoint.wait(lambda beat: beat["waiting"])
    assert {end["exitCode"] for end in saved["ends"]} == {ExitCode.SAVED}
    assert not saved["notice"]
    endpoint.reply = Reply.model_validate({"attempt": 4, "world": WORLD_4})
    assert process.wait(DEADLINE_SECONDS) == ExitCode.DONE


def test_progress_bars_and_garbage_reports_do_no_harm(start: Start) -> None:
    process = start(
        "sys.stderr.write('1%\\r2%\\r' + 'x' * 300000); os.write(int(os.environ['FINETUNE_REPORT_FD']), b'?\\n')"
    )
    _, err = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == ExitCode.DONE
    assert "sent an invalid report" in err


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("FINETUNE_ATTEMPT", "zero", "FINETUNE_ATTEMPT='zero' must be an integer of at least 1"),
        ("FINETUNE_POD_NAME", "", "FINETUNE_POD_NAME is not set"),
        ("FINETUNE_RUN_SPEC", "/nowhere/run.json", "cannot read /nowhere/run.json"),
        ("FINETUNE_BEAT_SECONDS", "-1", "must be a number of seconds"),
    ],
)
def test_a_bad_environment_is_a_sentence(start: Start, name: str, value: str, words: str) -> None:
    process = start("", **{name: value})
    _, err = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == ExitCode.CONFIG
    assert words in err


def test_a_signal_to_a_process_that_has_just_ended_leaves_its_exit_code() -> None:
    ended: Any = subprocess.Popen([sys.executable, "-c", "import sys; sys.exit(76)"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    send_signal(ended, signal.SIGTERM)
    # For asyncio's watcher, which waits in a thread of its own.
    _, status = os.waitpid(ended.pid, 0)
    ended.returncode = os.waitstatus_to_exitcode(status)
    assert ended.returncode == ExitCode.FABRIC
