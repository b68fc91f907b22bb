"""The coordinator under the beats of thousands of supervisors, over TLS, with tokens that a real API server reviews.

    python -m bench.beats [--jobs 1000] [--nodes-per-job 4] [--seconds 60]

Each supervisor keeps a connection and beats as often as the coordinator asks, with another step each time. Measured:
the operator's share of a core, all that it does included, and the time from a beat to its answer. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import resource
import ssl
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles

import psutil

from bench.operator import CONNECTIONS, Bench, requests
from bench.report import finish
from finetune_contract.beat import BEAT_PATH, Beat, RankReport, RankState, Reply
from finetune_operator.cluster.kube.client import PARTIAL_LIST, Json, KubeApi, connect
from finetune_operator.cluster.kube.clock import ServerClock
from finetune_operator.cluster.kube.objects import PODS
from finetune_operator.settings import Settings
from tests.controlplane.process import LOOPBACK
from tests.controlplane.server import ControlPlane
from tests.operator.bed import ACCOUNT, HOME, OperatorProcess, install, running

PAGE = 500


@dataclass
class Tally:
    """What the supervisors have seen."""

    latencies: list[float] = field(default_factory=list)
    refused: int = 0


@dataclass
class Supervisor:
    """One pod's end of the channel."""

    pod: Json
    token: str
    tally: Tally
    sequence: int = 0
    beat_seconds: float = Settings().beat_seconds

    async def run(self, port: int, context: ssl.SSLContext) -> None:
        """Beat for ever, at a phase of its own."""
        await asyncio.sleep(random.uniform(0, self.beat_seconds))
        reader, writer = await asyncio.open_connection(LOOPBACK, port, ssl=context, server_hostname=LOOPBACK)
        try:
            while True:
                started = time.monotonic()
                status, body = await self._post(reader, writer)
                self.tally.latencies.append(time.monotonic() - started)
                if status == 200:
                    self.beat_seconds = Reply.model_validate_json(body).beat_seconds or self.beat_seconds
                else:
                    self.tally.refused += 1
                await asyncio.sleep(self.beat_seconds - (time.monotonic() - started))
        finally:
            writer.close()

    async def _post(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[int, bytes]:
        body = self._beat().to_json().encode()
        head = (
            f"POST {BEAT_PATH} HTTP/1.1\r\nHost: {LOOPBACK}\r\nAuthorization: Bearer {self.token}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        return int(lines[0].split(" ")[1]), await reader.readexactly(int(headers["content-length"]))

    def _beat(self) -> Beat:
        self.sequence += 1
        meta, labels = self.pod["metadata"], self.pod["metadata"]["labels"]
        report = RankReport(
            rank=0, state=RankState.TRAINING, step=self.sequence, total_steps=100_000, loss=0.1, images_per_second=9.5
        )
        return Beat(
            job=labels["finetune-operator.io/job"],
            namespace=meta["namespace"],
            job_uid=meta["ownerReferences"][0]["uid"],
            pod=meta["name"],
            pod_uid=meta["uid"],
            attempt=int(labels["finetune-operator.io/attempt"]),
            node_rank=int(labels["finetune-operator.io/node-rank"]),
            sequence=self.sequence,
            ranks=(report,),
        )


async def supervisors(bench: Bench, namespace: str, tally: Tally) -> list[Supervisor]:
    """One for each pod, with a token of its own."""
    pods: list[Json] = []
    token = ""
    while True:
        page = await bench.api.get(PODS.path(namespace), {"limit": str(PAGE), "continue": token}, PARTIAL_LIST)
        pods += page["items"]
        token = page["metadata"].get("continue") or ""
        if not token:
            break
    made: list[Supervisor] = []

    async def make(pod: Json) -> None:
        meta = pod["metadata"]
        reference = {"apiVersion": "v1", "kind": "Pod", "name": meta["name"], "uid": meta["uid"]}
        audiences = [Settings().coordinator_audience]
        spec = {"audiences": audiences, "expirationSeconds": 3600, "boundObjectRef": reference}
        request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/default/token"
        answer = await bench.api.request("POST", path, request)
        made.append(Supervisor(pod, answer["status"]["token"], tally))

    await bench.each(make(pod) for pod in pods)
    return made


async def measure(bench: Bench, operator: OperatorProcess, context: ssl.SSLContext, seconds: float) -> Json:
    """All measurements."""
    namespace = bench.control_plane.create_namespace("beats")
    await bench.create_jobs(namespace)
    tally = Tally()
    with running(operator):
        assert operator.process is not None
        process = psutil.Process(operator.process.pid)
        await bench.wait("all pods are created", lambda: bench.count(namespace, bench.pods_in_all))
        all_of_them = await supervisors(bench, namespace, tally)
        tasks = [asyncio.create_task(one.run(operator.coordinator_port, context)) for one in all_of_them]

        async def settled() -> bool:
            return all(one.sequence > 2 for one in all_of_them)

        await bench.wait("all supervisors beat", settled)
        refused_at_first = tally.refused
        tally.latencies.clear()
        before, writes = process.cpu_times(), sum(requests(operator, writes_only=True).values())
        started = time.monotonic()
        await asyncio.sleep(seconds)
        after, elapsed = process.cpu_times(), time.monotonic() - started
        writes = sum(requests(operator, writes_only=True).values()) - writes
        rate = len(tally.latencies) / elapsed
        cores = (after.user + after.system - before.user - before.system) / elapsed
        for task in tasks:
            if task.done():
                task.result()
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        rss = process.memory_info().rss / 2**20
    p50, p99 = (1000 * quantiles(tally.latencies, n=100)[at] for at in (49, 98))
    bench.note("supervisors", f"{len(tasks)}, each every {all_of_them[0].beat_seconds:g} s: {rate:.0f} beats/s")
    bench.note("operator", f"{100 * cores:.0f} % of a core, {rss:.0f} MiB")
    bench.note("answer after", f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {1000 * max(tally.latencies):.0f} ms")
    bench.note("refused", f"{tally.refused - refused_at_first} ({refused_at_first} before all was warm)")
    bench.note("writes to the API server", f"{writes / elapsed:.1f} per second")
    return {
        "supervisors": len(tasks),
        "beats_per_second": round(rate),
        "cores": round(cores, 3),
        "p99_ms": round(p99, 1),
        "rss_mib": round(rss),
        "writes_per_second": round(writes / elapsed, 1),
    }


async def main() -> None:
    """Start a control plane and the operator, let the supervisors beat, print."""
    parser = argparse.ArgumentParser(prog="python -m bench.beats", description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000, help="number of FineTuneJobs (default: 1000)")
    parser.add_argument("--nodes-per-job", type=int, default=4, help="pods of each (default: 4)")
    parser.add_argument("--seconds", type=float, default=60.0, help="time of the measurement (default: 60)")
    options = parser.parse_args()
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    components = {"kube-controller-manager"}
    with tempfile.TemporaryDirectory() as folder, ControlPlane(components) as control_plane:
        install(control_plane)
        certificate = control_plane.authority.issue("coordinator", hosts=[LOOPBACK])
        client = await connect(control_plane.kubeconfig, num_connections=CONNECTIONS)
        operator = OperatorProcess(
            control_plane.kubeconfig_for(ACCOUNT, HOME, expiration_seconds=7200),
            Path(folder) / "operator.log",
            (
                "--lease-seconds=15",
                f"--coordinator-tls-cert={certificate.certificate}",
                f"--coordinator-tls-key={certificate.key}",
                "--coordinator-url=https://coordinator.invalid",
            ),
        )
        context = ssl.create_default_context(cafile=str(control_plane.authority.certificate))
        bench = Bench(control_plane, KubeApi(client, ServerClock()), options.jobs, options.nodes_per_job)
        try:
            result = await measure(bench, operator, context, options.seconds)
        finally:
            await client.close()
            print(operator.log.read_text()[-2000:] if operator.log.exists() else "no log")
    finish(("measurement", "value"), bench.rows, result)


if __name__ == "__main__":
    asyncio.run(main())
