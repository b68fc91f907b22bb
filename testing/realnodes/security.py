"""Check from inside a pod of a job that it cannot access the API or other jobs."""

from __future__ import annotations

import json
from collections.abc import Iterator

from testing.realnodes.names import TEAM
from testing.realnodes.store import KubectlCluster, Object

INSIDE = r"""
import json, os, ssl, sys, urllib.error, urllib.request
from pathlib import Path
from finetune_contract import environment
from finetune_contract.heartbeat import BEAT_PATH, Heartbeat, RankReport, RankState

found = {}
found["service account token"] = Path("/var/run/secrets/kubernetes.io").exists()
found["user"] = os.getuid()
status = Path("/proc/self/status").read_text()
found["capabilities"] = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff"))
found["no new privileges"] = "NoNewPrivs:\t1" in status
found["seccomp"] = "Seccomp:\t2" in status
try:
    Path("/app/written").write_text("x")
    found["root file system"] = "written"
except OSError as error:
    found["root file system"] = error.strerror

token = Path(os.environ[environment.COORDINATOR_TOKEN]).read_text().strip()


def request_status(url, method="GET", bearer="", body=None, context=None):
    headers = {"Content-Type": "application/json"} | ({"Authorization": "Bearer " + bearer} if bearer else {})
    request = urllib.request.Request(url, body.encode() if body else None, headers, method=method)
    try:
        return urllib.request.urlopen(request, timeout=10, context=context).status
    except urllib.error.HTTPError as error:
        return error.code


anything = ssl._create_unverified_context()
api = "https://kubernetes.default.svc"
pods = f"{api}/api/v1/namespaces/%s/pods" % os.environ["TEAM"]
found["read the API, its token"] = request_status(pods, bearer=token, context=anything)
found["read the API, no token"] = request_status(pods, context=anything)
found["write the API, its token"] = request_status(pods, "POST", token, "{}", anything)
found["write the API, no token"] = request_status(pods, "POST", "", "{}", anything)

trusted = ssl.create_default_context(cafile=os.environ[environment.COORDINATOR_CA])
beats = os.environ[environment.COORDINATOR_URL] + BEAT_PATH


def beat(job, pod, uid, job_uid, bearer):
    message = Heartbeat(job=job, namespace=os.environ["TEAM"], job_uid=job_uid, pod=pod, pod_uid=uid, attempt=1,
                node_rank=0, sequence=1, ranks=(RankReport(rank=0, state=RankState.TRAINING, step=1, total_steps=2),))
    return request_status(beats, "POST", bearer, message.to_json(), trusted)


other = json.loads(os.environ["OTHER"])
peer = json.loads(os.environ["PEER"])
found["heartbeat for another job"] = beat(other["job"], other["pod"], other["uid"], other["job_uid"], token)
found["heartbeat without a token"] = beat(other["job"], other["pod"], other["uid"], other["job_uid"], "")
own_uid = os.environ[environment.POD_UID]
own_pod = os.environ[environment.POD_NAME]
found["heartbeat in the name of another job"] = beat(other["job"], own_pod, own_uid, other["job_uid"], token)
found["heartbeat for a peer of its own job"] = beat(peer["job"], peer["pod"], peer["uid"], peer["job_uid"], token)
path = f"{beats}/{os.environ['TEAM']}/{other['job']}"
methods = ("GET", "POST", "PUT", "DELETE")
found["a path of another job"] = {request_status(path, method, token, None, trusted) for method in methods} == {404}
print(json.dumps(found))
"""

EXPECTED: dict[str, object] = {
    "service account token": False,
    "user": 1000,
    "capabilities": "0000000000000000",
    "no new privileges": True,
    "seccomp": True,
    "root file system": "Read-only file system",
    "read the API, its token": 401,
    "read the API, no token": 403,
    "write the API, its token": 401,
    "write the API, no token": 403,
    "heartbeat for another job": 403,
    "heartbeat without a token": 401,
    "heartbeat in the name of another job": 403,
    "heartbeat for a peer of its own job": 403,
    "a path of another job": True,
}


def check_inside(cluster: KubectlCluster, pod: str, other: Object, peer: Object) -> dict[str, object]:
    """Return the results of the checks in a pod. `other` is a pod of another job, `peer` a pod of its own job."""
    variables = (f"TEAM={TEAM}", f"OTHER={json.dumps(identity_of(other))}", f"PEER={json.dumps(identity_of(peer))}")
    command = ("exec", pod, "--", "env", *variables, "python", "-c", INSIDE)
    found: dict[str, object] = json.loads(cluster.kubectl("--namespace", TEAM, *command, timeout_seconds=90))
    return found


def identity_of(pod: Object) -> dict[str, str]:
    """Return the identity that a heartbeat of the pod would contain."""
    metadata = pod["metadata"]
    (owner,) = metadata["ownerReferences"]
    return {"job": owner["name"], "job_uid": owner["uid"], "pod": metadata["name"], "uid": metadata["uid"]}


def find_differences(found: dict[str, object]) -> Iterator[str]:
    """Yield a message for each difference from what is expected."""
    for what, expected in EXPECTED.items():
        if found.get(what) != expected:
            yield f"{what}: {found.get(what)!r} instead of {expected!r}"
