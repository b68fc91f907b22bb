"""Jobs in different phases, for tests of the output."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_operator.api.job import FineTuneJob

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def ago(**length: float) -> str:
    return (NOW - timedelta(**length)).isoformat()


SPEC: dict[str, Any] = {
    "model": {"base": "/models/sd15"},
    "dataset": {"source": "/data/circles"},
    "training": {"method": "LoRA", "steps": 200, "batchSize": 4, "gradientAccumulation": 2, "precision": "bf16"},
    "topology": {"accelerator": "cpu", "nodes": 2},
}


def job(name: str, status: dict[str, Any], created: str, **spec: Any) -> FineTuneJob:
    meta = {"name": name, "uid": "1f0c3a2b-0000-4000-8000-000000000000", "creationTimestamp": created}
    document = {"metadata": {**meta, "labels": {"team": "art"}}, "spec": {**SPEC, **spec}, "status": status}
    return FineTuneJob.model_validate(document)


PENDING = job("fresh", {}, ago(seconds=3))

RUNNING = job(
    "circles",
    {
        "observedGeneration": 1,
        "phase": "Running",
        "reason": "Training",
        "message": "step 130 of 200",
        "conditions": [
            {
                "type": "Accepted",
                "status": "True",
                "reason": "Accepted",
                "message": "the spec is valid and supported",
                "lastTransitionTime": ago(minutes=14),
            },
            {"type": "Running", "status": "True", "reason": "Training", "lastTransitionTime": ago(minutes=5)},
        ],
        "attempt": 2,
        "step": 130,
        "totalSteps": 200,
        "progress": "65%",
        "eta": "4m10s",
        "loss": 0.0731,
        "imagesPerSecond": 4.48,
        "performance": {
            "utilization": 0.78,
            "memoryAllocatedBytes": 1_932_735_283,
            "timeShares": {"compute": 0.78, "data": 0.004, "exchange": 0.2, "checkpoint": 0.02},
            "boundBy": "Exchange",
            "advice": [
                "exchange-bound: the ranks wait for each other; exchange less often with "
                "training.gradientAccumulation: 4 in a new job, or use a faster network"
            ],
        },
        "lastCheckpoint": {"step": 120, "time": ago(seconds=75), "bytes": 3_423_232, "attempt": 2},
        "nodes": "2/2",
        "preemptions": 1,
        "failures": 0,
        "lostSteps": 7,
        "goodput": 0.91,
        "startTime": ago(minutes=14),
        "attempts": [
            {
                "attempt": 1,
                "startedAt": ago(minutes=14),
                "gangComplete": True,
                "fromStep": 0,
                "toStep": 67,
                "endedAt": ago(minutes=6),
                "reason": "PodLost",
                "countsAs": "Preemption",
                "rank": 1,
                "pod": "circles-a1-n1",
                "node": "local-1",
                "lostSteps": 7,
            },
            {
                "attempt": 2,
                "startedAt": ago(minutes=5, seconds=50),
                "gangComplete": True,
                "fromStep": 60,
                "toStep": 130,
            },
        ],
        "warnings": ["checkpoint step-60-a1 is skipped: unet.safetensors is missing"],
    },
    ago(minutes=15),
)

FAILED = job(
    "squares",
    {
        "phase": "Failed",
        "reason": "MaxFailuresExceeded",
        "message": "1 failure in total, 0 allowed",
        "conditions": [
            {
                "type": "Failed",
                "status": "True",
                "reason": "MaxFailuresExceeded",
                "message": "1 failure in total, 0 allowed",
                "lastTransitionTime": ago(hours=5),
            }
        ],
        "attempt": 1,
        "step": 3,
        "totalSteps": 200,
        "progress": "1%",
        "nodes": "0/2",
        "preemptions": 0,
        "failures": 1,
        "startTime": ago(hours=5, minutes=3),
        "completionTime": ago(hours=5),
        "attempts": [
            {
                "attempt": 1,
                "startedAt": ago(hours=5, minutes=3),
                "gangComplete": True,
                "fromStep": 0,
                "toStep": 3,
                "endedAt": ago(hours=5),
                "reason": "OutOfMemory",
                "countsAs": "Failure",
                "rank": 0,
                "pod": "squares-a1-n0",
                "node": "local-0",
                "exitCode": 137,
                "message": "Traceback (most recent call last):\nMemoryError",
            }
        ],
    },
    ago(days=3, hours=4),
)

SUCCEEDED = job(
    "stripes",
    {
        "phase": "Succeeded",
        "reason": "Finished",
        "message": "200 steps trained",
        "attempt": 1,
        "step": 200,
        "totalSteps": 200,
        "progress": "100%",
        "loss": 0.05,
        "imagesPerSecond": 12.0,
        "lastCheckpoint": {"step": 200, "time": ago(days=20), "bytes": 3_423_232, "attempt": 1},
        "nodes": "0/2",
        "goodput": 0.97,
        "startTime": ago(days=20, minutes=9),
        "completionTime": ago(days=20),
        "inputs": [
            {"field": "model.base", "location": "me/base", "commit": "1f0c3a2b" * 5},
            {"field": "dataset.source", "location": "/data/stripes", "content": "9e2d" * 16, "samples": 64},
        ],
        "outputs": [{"format": "diffusers", "to": "/out/stripes", "bytes": 3_100_000}],
    },
    ago(days=20, minutes=10),
)

EVENTS = [
    {
        "type": "Normal",
        "reason": "AttemptStarted",
        "message": "attempt 1 started",
        "count": 1,
        "firstTimestamp": ago(minutes=14),
        "lastTimestamp": ago(minutes=14),
    },
    {
        "type": "Warning",
        "reason": "TrainerWarning",
        "message": "the disk is almost full",
        "count": 3,
        "firstTimestamp": ago(minutes=9),
        "lastTimestamp": ago(seconds=40),
    },
]
