"""Flags of `finetune-operator run`. Each is also an environment variable: --num-workers is FINETUNE_NUM_WORKERS."""

from __future__ import annotations

import argparse
import os
import socket
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from finetune_operator.cluster.kube.leader.lease import LeaseOptions
from finetune_operator.cluster.kube.options import CoordinatorOptions, OperatorOptions, UpdateLimits
from finetune_operator.server.flag import (
    METAVARS,
    Flag,
    parse_bool,
    parse_label,
    parse_name,
    parse_names,
    parse_url,
)
from finetune_operator.settings import Settings

PORTS = (1, 65535)
DAY = 86400
MAX_INT = 2**31 - 1
OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True)
class RunOptions:
    """The parsed command line."""

    operator: OperatorOptions
    settings: Settings
    probe_host: str
    probe_port: int
    log_format: str
    log_level: str
    watch_nodes: bool


_DEFAULTS = Settings()

GROUPS: dict[str, tuple[Flag, ...]] = {
    "cluster": (
        Flag("kubeconfig", None, "kubeconfig to use; default: the pod's service account", Path),
        Flag("context", None, "context of the kubeconfig; default: its current context"),
        Flag("namespaces", (), "comma-separated namespaces to watch; default: all", parse_names),
        Flag("watch-nodes", True, "watch nodes; if false, a lost node is detected by its pods only", parse_bool),
        Flag(
            "taint-after-jobs",
            0,
            "taint a node after GPUs of this number of jobs failed on it within a day; 0: never",
            int,
            between=(0, 1000),
        ),
        Flag("kueue", False, "let jobs request queues of Kueue", parse_bool),
        Flag(
            "kueue-priority-boost",
            False,
            "write the cost of an eviction into Workloads, for Kueue's feature gate PriorityBoost",
            parse_bool,
        ),
        Flag(
            "kueue-topology",
            False,
            "let Kueue choose the domain of jobs with topology.pack; true if the flavors have topologies",
            parse_bool,
        ),
        Flag("gangs", False, "give the pods of a job their nodes together (spec.scheduling)", parse_bool),
        Flag("disruption-budgets", False, "create a PodDisruptionBudget for each running gang", parse_bool),
        Flag("eviction-requests", False, "respond to eviction requests of Kubernetes 1.37 (alpha)", parse_bool),
        Flag(
            "gang-hold-seconds",
            _DEFAULTS.gang_hold_seconds,
            "longest time for which an incomplete gang holds nodes",
            float,
            between=(1, DAY),
        ),
        Flag("num-workers", 32, "number of jobs that are reconciled at the same time", int, between=(1, 1000)),
    ),
    "several replicas": (
        Flag("leader-election", True, "elect a leader; false if this is the only replica", parse_bool),
        Flag("lease-namespace", "", "namespace of the lease; default: the operator's namespace", parse_name),
        Flag("lease-name", "finetune-operator", "name of the lease", parse_name),
        Flag(
            "lease-seconds",
            15.0,
            "time after which a leader that does not renew its lease is replaced",
            float,
            between=(1, 3600),
        ),
        Flag("identity", "", "name of this replica; default: its host name and a random suffix"),
    ),
    "coordinator": (
        Flag("coordinator", True, "receive heartbeats; if false, jobs show no steps", parse_bool),
        Flag("coordinator-host", "0.0.0.0", "address to receive heartbeats on"),  # noqa: S104
        Flag("coordinator-port", 8443, "port to receive heartbeats on", int, between=PORTS),
        Flag(
            "max-connections",
            10_000,
            "open connections of supervisors; a connection uses 32 KiB of memory",
            int,
            between=(1, 1_000_000),
        ),
        Flag("coordinator-tls-cert", None, "certificate, PEM; reloaded when it changes; default: plain HTTP", Path),
        Flag("coordinator-tls-key", None, "private key of the certificate, PEM", Path),
        Flag("coordinator-ca", None, "authority of the certificate, PEM; distributed to the pods of each job", Path),
        Flag(
            "coordinator-tls-secret",
            "",
            "Secret for an authority that the operator creates, instead of files",
            parse_name,
        ),
        Flag(
            "coordinator-service",
            "",
            "Service without a selector whose endpoint is the leader; default: none",
            parse_name,
        ),
        Flag("pod-ip", "", "address of this pod, for the endpoint of that Service"),
        Flag("coordinator-url", "", "URL that supervisors send heartbeats to; default: no heartbeats", parse_url),
        Flag(
            "coordinator-ca-config",
            "",
            "ConfigMap with ca.crt, in each job's namespace, that supervisors trust",
            parse_name,
        ),
        Flag("coordinator-audience", _DEFAULTS.coordinator_audience, "audience of the supervisors' tokens"),
        Flag("token-seconds", _DEFAULTS.token_seconds, "lifetime of a supervisor's token", int, between=(600, MAX_INT)),
        Flag("beat-seconds", _DEFAULTS.beat_seconds, "maximum time between two heartbeats", float, between=(0.1, 3600)),
        Flag(
            "beats-per-second",
            500.0,
            "maximum heartbeat rate of all pods; with more pods, each sends less often",
            float,
            between=(1, 1_000_000),
        ),
        Flag(
            "beat-timeout-seconds",
            _DEFAULTS.beat_timeout_seconds,
            "time until a pod is reported as silent",
            float,
            between=(1, DAY),
        ),
    ),
    "progress in the status": (
        Flag("progress-seconds", 5.0, "minimum time between two progress writes of one job", float, between=(0, 3600)),
        Flag(
            "progress-writes-per-second",
            20.0,
            "maximum rate of progress writes of all jobs",
            float,
            between=(0.1, 100_000),
        ),
    ),
    "jobs": (
        Flag("trainer-image-gpu", _DEFAULTS.trainer_image_gpu, "image of GPU pods"),
        Flag("trainer-image-cpu", _DEFAULTS.trainer_image_cpu, "image of CPU pods"),
        Flag(
            "trainer-image-cpu-intel",
            _DEFAULTS.trainer_image_cpu_intel,
            "image of CPU pods whose jobs request oneCCL or IPEX",
        ),
        Flag(
            "trainer-image-export",
            _DEFAULTS.trainer_image_export,
            "image of pods that write outputs with the extra export (openvino); empty: jobs cannot request them",
        ),
        Flag(
            "cores-per-rank",
            _DEFAULTS.cores_per_rank,
            "CPU cores requested per rank if a job sets none",
            int,
            between=(0, 1024),
        ),
        Flag("rendezvous-port", _DEFAULTS.rendezvous_port, "port of rank 0's rendezvous store", int, between=PORTS),
        Flag(
            "rack-label",
            "",
            "label of nodes whose value is their rack, for topology.pack: rack; default: none",
            parse_label,
        ),
        Flag(
            "cache-claim",
            "",
            "claim, in each job's namespace, for the shared cache; default: the job's storage",
            parse_name,
        ),
        Flag(
            "resize-pods",
            False,
            "raise the memory of running pods in place (recovery.maxMemory)",
            parse_bool,
        ),
        Flag("user-namespaces", False, "run pods in user namespaces of their own (hostUsers: false)", parse_bool),
        Flag("trainer-user-id", _DEFAULTS.trainer_user_id, "user and group of the trainer", int, between=(1, MAX_INT)),
        Flag(
            "max-attempts-kept",
            _DEFAULTS.max_attempts_kept,
            "maximum length of status.attempts",
            int,
            between=(2, 1000),
        ),
        Flag(
            "failure-backoff-seconds",
            _DEFAULTS.failure_backoff_seconds,
            "delay after the first failure",
            float,
            between=(0, DAY),
        ),
        Flag(
            "failure-backoff-max-seconds",
            _DEFAULTS.failure_backoff_max_seconds,
            "maximum of that delay",
            float,
            between=(0, DAY),
        ),
        Flag(
            "same-step-failures",
            _DEFAULTS.same_step_failures,
            "failures in a row at one step that end a job",
            int,
            between=(1, 1000),
        ),
        Flag(
            "hold-seconds",
            _DEFAULTS.hold_seconds,
            "how long a supervisor without replies keeps waiting",
            float,
            between=(0, DAY),
        ),
        Flag(
            "regroup-seconds",
            _DEFAULTS.regroup_seconds,
            "training time before a move to better capacity",
            float,
            between=(0, DAY),
        ),
        Flag(
            "quota-hold-seconds",
            _DEFAULTS.quota_hold_seconds,
            "how long a gang keeps its pods while the cluster refuses the others; 0: without limit",
            float,
            between=(0, DAY),
        ),
        Flag(
            "standstill-seconds",
            _DEFAULTS.standstill_seconds,
            "time limit of a load or save that hangs",
            float,
            between=(1, MAX_INT),
        ),
        Flag(
            "cause-seconds",
            _DEFAULTS.cause_seconds,
            "how long to wait for the cause of a lost peer",
            float,
            between=(0, DAY),
        ),
        Flag(
            "peer-grace-seconds",
            _DEFAULTS.peer_grace_seconds,
            "grace period of pods that have lost a peer",
            int,
            between=(0, 3600),
        ),
    ),
    "probes and logs": (
        Flag("probe-host", "0.0.0.0", "address of /livez, /readyz and /metrics"),  # noqa: S104
        Flag("probe-port", 8080, "port of /livez, /readyz and /metrics", int, between=PORTS),
        Flag("log-format", "json", "format of the log lines", choices=("json", "text")),
        Flag("log-level", "info", "minimum level of log messages", choices=("debug", "info", "warning", "error")),
    ),
}
"""All flags, by their group in --help."""

SETTINGS = frozenset(Settings.__dataclass_fields__)


def value_schemas() -> dict[str, dict[str, Any]]:
    """Return the JSON schema of the value of each flag."""
    return {flag.name: flag.schema for flags in GROUPS.values() for flag in flags}


def add_flags(parser: argparse.ArgumentParser, environment: Mapping[str, str] | None = None) -> None:
    """Add all flags; environment variables provide their defaults."""
    environment = os.environ if environment is None else environment
    for title, flags in GROUPS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            shown = f" (default: {_format_default(flag.default)})" if flag.default not in (None, "", ()) else ""
            group.add_argument(
                f"--{flag.name}",
                # argparse parses a string default like a flag's value, with the same errors.
                default=environment.get(flag.variable, flag.default),
                type=flag.parse,
                choices=flag.choices,
                metavar=_metavar(flag),
                help=f"{flag.help}{shown} [${flag.variable}]",
            )


def _metavar(flag: Flag) -> str:
    """Return the placeholder of a value in --help."""
    if flag.choices:
        return "|".join(flag.choices)
    if flag.read in METAVARS:
        return "SECONDS" if flag.name.endswith("-seconds") else METAVARS[flag.read]
    return flag.name.rpartition("-")[2].upper()


def read_options(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> RunOptions:
    """Parse a command line; an invalid combination ends the process with an error message."""
    given = parser.parse_args(arguments)
    if (given.coordinator_tls_cert is None) != (given.coordinator_tls_key is None):
        parser.error("set both --coordinator-tls-cert and --coordinator-tls-key, or neither for plain HTTP")
    if given.coordinator_tls_secret and (given.coordinator_tls_cert or given.coordinator_ca):
        parser.error("--coordinator-tls-secret replaces --coordinator-tls-cert and --coordinator-ca: set only one")
    if given.coordinator_tls_secret and not urlsplit(given.coordinator_url).hostname:
        parser.error("--coordinator-tls-secret requires --coordinator-url: the certificate is issued for its host")
    if given.coordinator_ca_config and (given.coordinator_tls_secret or given.coordinator_ca):
        parser.error("--coordinator-ca-config is for an authority that another tool distributes: remove it")
    if given.disruption_budgets and not given.watch_nodes:
        parser.error(
            "--disruption-budgets requires --watch-nodes=true: the budget is deleted when a node is cordoned, so that "
            "the node can be drained"
        )
    if given.coordinator_service and not given.pod_ip:
        parser.error("--coordinator-service requires --pod-ip: the address to publish in the Service")
    if given.beat_timeout_seconds <= given.beat_seconds:
        parser.error("--beat-timeout-seconds: set more than --beat-seconds; otherwise every pod is reported as silent")
    if given.failure_backoff_max_seconds < given.failure_backoff_seconds:
        parser.error("--failure-backoff-max-seconds: set at least --failure-backoff-seconds")
    if given.coordinator and given.coordinator_port == given.probe_port:
        parser.error("--probe-port: set another port than --coordinator-port")
    namespace = given.lease_namespace or _own_namespace()
    identity = given.identity or f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}"
    return RunOptions(
        operator=OperatorOptions(
            identity=identity,
            kubeconfig=given.kubeconfig,
            context=given.context,
            namespaces=given.namespaces,
            num_workers=given.num_workers,
            lease=_lease(given, namespace, identity),
            coordinator=_coordinator(given, namespace),
            limits=UpdateLimits(given.progress_seconds, given.progress_writes_per_second, given.beats_per_second),
            taint_after_jobs=given.taint_after_jobs,
        ),
        settings=_settings(given),
        probe_host=given.probe_host,
        probe_port=given.probe_port,
        log_format=given.log_format,
        log_level=given.log_level,
        watch_nodes=given.watch_nodes,
    )


def _settings(given: argparse.Namespace) -> Settings:
    values = {name: value for name, value in vars(given).items() if name in SETTINGS}
    in_run = bool(given.coordinator_tls_secret or given.coordinator_ca)
    return Settings(**values, coordinator_ca_in_run=in_run)


def _lease(given: argparse.Namespace, namespace: str, identity: str) -> LeaseOptions | None:
    if not given.leader_election:
        return None
    return LeaseOptions(namespace, given.lease_name, identity, given.lease_seconds)


def _coordinator(given: argparse.Namespace, namespace: str) -> CoordinatorOptions | None:
    if not given.coordinator:
        return None
    return CoordinatorOptions(
        host=given.coordinator_host,
        port=given.coordinator_port,
        max_connections=given.max_connections,
        certificate=given.coordinator_tls_cert,
        key=given.coordinator_tls_key,
        authority=given.coordinator_ca,
        secret=given.coordinator_tls_secret,
        hosts=tuple(filter(None, [urlsplit(given.coordinator_url).hostname])),
        namespace=namespace,
        service=given.coordinator_service,
        address=given.pod_ip,
    )


def _own_namespace() -> str:
    return OWN_NAMESPACE.read_text().strip() if OWN_NAMESPACE.exists() else "default"


def _format_default(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
