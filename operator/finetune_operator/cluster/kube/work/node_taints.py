"""Taints nodes on which the GPUs of several jobs have failed. Off by default; the leader runs it in a term.

`find_faulty` decides from the ledgers of all jobs; `NodeTainter` writes the taint. An administrator removes it after
the repair. It is written again only after another job has lost a GPU there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any

from finetune_contract.exit_codes import ExitCode
from finetune_operator.api.job import GROUP, FineTuneJob
from finetune_operator.api.reasons import Reason
from finetune_operator.cluster.kube.client.client import ApiError, KubeApi, NotLeaderError

log = logging.getLogger(__name__)

TAINT = f"{GROUP}/gpu-fault"
"""Key of the taint. Its effect is NoSchedule: pods that work there may stay."""
CHECK_SECONDS = 30.0
CONFLICT = 409
WINDOW = timedelta(hours=24)
"""Time for which a fault counts."""
MERGE = "application/merge-patch+json"


def find_faulty(jobs: Iterable[FineTuneJob], now: datetime, min_jobs: int) -> dict[str, frozenset[str]]:
    """Return the nodes on which at least `min_jobs` jobs lost a GPU, with the UIDs of these jobs. Pure.

    Nodes that a health tool reports are left to that tool.
    """
    evidence: dict[str, set[str]] = {}
    for job in jobs:
        for entry in job.status.attempts:
            is_seen = entry.gpu is not None or entry.exit_code == ExitCode.DEVICE
            is_recent = entry.ended_at is not None and now - entry.ended_at <= WINDOW
            if entry.reason == Reason.GPU_FAULT and entry.node and is_seen and is_recent:
                evidence.setdefault(entry.node, set()).add(job.metadata.uid)
    return {node: frozenset(uids) for node, uids in evidence.items() if len(uids) >= min_jobs}


def build_patch(node: Mapping[str, Any], num_jobs: int) -> dict[str, Any]:
    """Return the patch of a node that adds the taint. Taints are one list: those of others are repeated.

    Args:
        node: the node in its API form; the patch is refused if it has changed since.
        num_jobs: number of jobs that lost a GPU on it.
    """
    others = [taint for taint in node.get("spec", {}).get("taints") or () if taint["key"] != TAINT]
    own = {"key": TAINT, "value": f"{num_jobs}-jobs", "effect": "NoSchedule"}
    version = node["metadata"]["resourceVersion"]
    return {"metadata": {"resourceVersion": version}, "spec": {"taints": [*others, own]}}


class NodeTainter:
    """Adds the taint to faulty nodes.

    Args:
        api: sends the patches.
        jobs: returns all jobs that the operator manages.
        now: returns the current time.
        min_jobs: number of jobs from which a node is tainted.
    """

    def __init__(
        self,
        api: KubeApi,
        jobs: Callable[[], Iterable[FineTuneJob]],
        now: Callable[[], datetime],
        min_jobs: int,
    ) -> None:
        self._api, self._jobs, self._now, self._min_jobs = api, jobs, now, min_jobs
        self._tainted: dict[str, frozenset[str]] = {}

    async def watch(self) -> None:
        """Look for faulty nodes from time to time."""
        while True:
            await self.taint(find_faulty(self._jobs(), self._now(), self._min_jobs))
            await asyncio.sleep(CHECK_SECONDS)

    async def taint(self, faulty: Mapping[str, frozenset[str]]) -> None:
        """Taint nodes for which there is new evidence."""
        for node, uids in faulty.items():
            if uids <= self._tainted.get(node, frozenset()):
                continue
            path = f"/api/v1/nodes/{node}"
            try:
                patch = build_patch(await self._api.get(path), len(uids))
                await self._api.request("PATCH", path, patch, content_type=MERGE)
            except NotLeaderError:
                continue
            except ApiError as error:
                log.warning("cannot taint the node %s: %s", node, error)
                if error.transient or error.status == CONFLICT:
                    continue
            else:
                log.warning("node %s has the taint %s: GPUs of %d jobs have failed on it", node, TAINT, len(uids))
            self._tainted[node] = uids
