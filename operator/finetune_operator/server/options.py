"""Flags of `finetune-operator run`. Each is also an environment variable: --num-workers is FINETUNE_NUM_WORKERS."""

from __future__ import annotations

import argparse
import os
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from finetune_operator.cluster.kube.cluster import Pace
from finetune_operator.cluster.kube.leader.lease import LeaseOptions
from finetune_operator.cluster.kube.operator import CoordinatorOptions, OperatorOptions
from finetune_operator.settings import Settings

PREFIX = "FINETUNE_"
OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True)
class RunOptions:
    """All that the command line says."""

    operator: OperatorOptions
    settings: Settings
    probe_host: str
    probe_port: int
    log_format: str
    log_level: str
    watch_nodes: bool


@dataclass(frozen=True)
class _Flag:
    name: str
    default: Any
    help: str
    read: Callable[[str], Any] = str
    choices: tuple[str, ...] | None = None

    @property
    def variable(self) -> str:
        return PREFIX + self.name.replace("-", "_").upper()


def _yes(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


METAVARS: dict[Callable[[str], Any], str] = {_yes: "true|false", _words: "NAME,...", int: "N", float: "N", Path: "FILE"}
_DEFAULTS = Settings()

GROUPS: dict[str, tuple[_Flag, ...]] = {
    "cluster": (
        _Flag("kubeconfig", None, "kubeconfig to use; default: the pod's own service account", Path),
        _Flag("context", None, "context of the kubeconfig; default: its current one"),
        _Flag("namespaces", (), "namespaces to look after, by commas; default: all", _words),
        _Flag("watch-nodes", True, "false: nodes are not watched, and lost ones are seen by their pods only", _yes),
        _Flag("num-workers", 32, "jobs that are worked on at a time", int),
    ),
    "several replicas": (
        _Flag("leader-election", True, "false: this is the only replica", _yes),
        _Flag("lease-namespace", "", "namespace of the lease; default: the operator's own"),
        _Flag("lease-name", "finetune-operator", "name of the lease"),
        _Flag("lease-seconds", 15.0, "time after which a silent leader is replaced", float),
        _Flag("identity", "", "name of this replica; default: its host name and a random part"),
    ),
    "coordinator": (
        _Flag("coordinator", True, "false: no beats are taken; jobs then show no steps", _yes),
        _Flag("coordinator-host", "0.0.0.0", "address to take beats on"),  # noqa: S104
        _Flag("coordinator-port", 8443, "port to take beats on", int),
        _Flag("coordinator-tls-cert", None, "certificate, PEM; loaded anew when it changes; default: plain HTTP", Path),
        _Flag("coordinator-tls-key", None, "its private key, PEM", Path),
        _Flag("coordinator-ca", None, "its authority, PEM; the operator hands it to each job's pods", Path),
        _Flag("coordinator-tls-secret", "", "in place of files: Secret in which it keeps an authority of its own"),
        _Flag("coordinator-service", "", "Service without selector whose endpoint the leader becomes; default: none"),
        _Flag("pod-ip", "", "this pod's address, for that service"),
        _Flag("coordinator-url", "", "where supervisors post their beats; default: nowhere"),
        _Flag("coordinator-ca-config", "", "ConfigMap with ca.crt, in each job's namespace, that supervisors trust"),
        _Flag("coordinator-audience", _DEFAULTS.coordinator_audience, "audience of the supervisors' tokens"),
        _Flag("token-seconds", _DEFAULTS.token_seconds, "life of a supervisor's token", int),
        _Flag("beat-seconds", _DEFAULTS.beat_seconds, "longest time between two beats", float),
        _Flag("beats-per-second", 500.0, "beats that are asked for in all; with more pods, each beats seldomer", float),
        _Flag("beat-timeout-seconds", _DEFAULTS.beat_timeout_seconds, "silence that is shown as such", float),
    ),
    "progress in the status": (
        _Flag("progress-seconds", 5.0, "least time between two writes of one job's progress", float),
        _Flag("progress-writes-per-second", 20.0, "most such writes of all jobs together", float),
    ),
    "jobs": (
        _Flag("trainer-image-gpu", _DEFAULTS.trainer_image_gpu, "image of GPU pods"),
        _Flag("trainer-image-cpu", _DEFAULTS.trainer_image_cpu, "image of CPU pods"),
        _Flag("cores-per-rank", _DEFAULTS.cores_per_rank, "cores of a rank where a job does not say", int),
        _Flag("rendezvous-port", _DEFAULTS.rendezvous_port, "port of rank 0's rendezvous store", int),
        _Flag("cache-claim", "", "claim, in each job's namespace, for what jobs share; default: the job's storage"),
        _Flag("trainer-user-id", _DEFAULTS.trainer_user_id, "user and group of the trainer", int),
        _Flag("max-attempts-kept", _DEFAULTS.max_attempts_kept, "length of status.attempts", int),
        _Flag("failure-backoff-seconds", _DEFAULTS.failure_backoff_seconds, "wait after a first failure", float),
        _Flag("failure-backoff-max-seconds", _DEFAULTS.failure_backoff_max_seconds, "longest such wait", float),
        _Flag("same-step-failures", _DEFAULTS.same_step_failures, "failures in a row at one step that end a job", int),
        _Flag("hold-seconds", _DEFAULTS.hold_seconds, "how long an unanswered supervisor waits for a new world", float),
        _Flag("regroup-seconds", _DEFAULTS.regroup_seconds, "training between two changes to better capacity", float),
        _Flag("standstill-seconds", _DEFAULTS.standstill_seconds, "how long loading or saving may stand still", float),
        _Flag("cause-seconds", _DEFAULTS.cause_seconds, "how long a lost peer waits for its cause to show", float),
        _Flag("peer-grace-seconds", _DEFAULTS.peer_grace_seconds, "grace of pods whose gang is broken", int),
    ),
    "probes and logs": (
        _Flag("probe-host", "0.0.0.0", "address of /livez, /readyz and /metrics"),  # noqa: S104
        _Flag("probe-port", 8080, "their port", int),
        _Flag("log-format", "json", "form of the log lines", choices=("json", "text")),
        _Flag("log-level", "info", "least level that is logged", choices=("debug", "info", "warning", "error")),
    ),
}
"""Every flag, by the title under which --help shows it."""

SETTINGS = frozenset(Settings.__dataclass_fields__)


def add_flags(parser: argparse.ArgumentParser, environment: Mapping[str, str] | None = None) -> None:
    """Add all flags; what the environment says is their default."""
    environment = os.environ if environment is None else environment
    for title, flags in GROUPS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            shown = f" (default: {_show(flag.default)})" if flag.default not in (None, "", ()) else ""
            group.add_argument(
                f"--{flag.name}",
                # A text default is read as if it had been given as a flag, and refused with the same words.
                default=environment.get(flag.variable, flag.default),
                type=flag.read,
                choices=flag.choices,
                metavar=_metavar(flag),
                help=f"{flag.help}{shown} [${flag.variable}]",
            )


def _metavar(flag: _Flag) -> str:
    """What --help shows for a value."""
    if flag.choices:
        return "|".join(flag.choices)
    if flag.read in METAVARS:
        return "SECONDS" if flag.name.endswith("-seconds") else METAVARS[flag.read]
    return flag.name.rpartition("-")[2].upper()


def read_options(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> RunOptions:
    """Parse a command line; one that makes no sense ends the process with a sentence."""
    given = parser.parse_args(arguments)
    if (given.coordinator_tls_cert is None) != (given.coordinator_tls_key is None):
        parser.error("--coordinator-tls-cert and --coordinator-tls-key go together: give both, or none for plain HTTP")
    if given.coordinator_tls_secret and (given.coordinator_tls_cert or given.coordinator_ca):
        parser.error(
            "--coordinator-tls-secret takes the place of --coordinator-tls-cert and --coordinator-ca: give one"
        )
    if given.coordinator_tls_secret and not urlsplit(given.coordinator_url).hostname:
        parser.error("--coordinator-tls-secret needs --coordinator-url: the certificate is for the host in it")
    if given.coordinator_ca_config and (given.coordinator_tls_secret or given.coordinator_ca):
        parser.error("--coordinator-ca-config is for an authority that somebody else hands out: leave it out")
    if given.coordinator_service and not given.pod_ip:
        parser.error("--coordinator-service needs --pod-ip: the address that supervisors are to be sent to")
    if given.num_workers < 1:
        parser.error("--num-workers: give 1 or more")
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
            pace=Pace(given.progress_seconds, given.progress_writes_per_second, given.beats_per_second),
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


def _show(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
