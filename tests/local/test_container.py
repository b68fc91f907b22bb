"""Translation of a pod manifest into a process of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_operator.api.job import FineTuneJob
from finetune_operator.cluster.local.kubelet.container import (
    Container,
    LocalResources,
    UnsupportedError,
    build_container,
    expand_references,
)
from finetune_operator.cluster.local.settings import LOCAL
from finetune_operator.manifests import build_pod

RESOURCES = LocalResources(
    folders={"checkpoints": Path("/state/storage"), "data": Path("/disk/data")},
    termination_log=Path("/state/pods/p/termination-log"),
    temporary=Path("/tmp/finetune-1"),
    node="local-0",
    master_port=15_001,
)
MACHINE = {"PATH": "/bin", "HOME": "/home/me", "SECRET": "x", "LANG": "C.UTF-8"}


def build(**container: Any) -> Container:
    value = {"name": "trainer", "command": ["true"], **container}
    pod = {
        "metadata": {"name": "circles-a1-n0", "namespace": "default", "uid": "uid-1", "labels": {"a/b": "c"}},
        "spec": {"containers": [value]},
    }
    return build_container(pod, RESOURCES, MACHINE, lambda command: (f"/venv/bin/{command}",))


def variables(*entries: dict[str, Any], **container: Any) -> dict[str, str]:
    return dict(build(env=list(entries), **container).environment)


def test_only_allowed_variables_are_inherited() -> None:
    env = build().environment
    assert env["PATH"] == "/bin"
    assert "SECRET" not in env
    assert env["TMPDIR"] == "/tmp/finetune-1"
    assert env["GLOO_SOCKET_IFNAME"] == "lo"


def test_paths_below_mounts_are_rewritten() -> None:
    mounts = [
        {"name": "checkpoints", "mountPath": "/finetune/storage"},
        {"name": "data", "mountPath": "/finetune/storage/data", "subPath": "train"},
    ]
    container = build(
        command=["train", "/finetune/storage"],
        args=[
            "--out=/finetune/storage/x",
            "--data",
            "/finetune/storage/data/y",
            "/finetune/storages",
            "a=/finetune/storage",
        ],
        env=[
            {"name": "EXACT", "value": "/finetune/storage"},
            {"name": "LOG", "value": "/dev/termination-log"},
            {"name": "OTHER", "value": "/finetune"},
        ],
        volumeMounts=mounts,
        workingDir="/finetune/storage/work",
    )
    assert container.argv == (
        "/venv/bin/train",
        "/state/storage",
        "--out=/state/storage/x",
        "--data",
        "/disk/data/train/y",
        "/finetune/storages",
        "a=/finetune/storage",
    )
    assert container.environment["EXACT"] == "/state/storage"
    assert container.environment["LOG"] == "/state/pods/p/termination-log"
    assert container.environment["OTHER"] == "/finetune"
    assert container.working_folder == Path("/state/storage/work")


def test_a_mounted_tmp_is_rewritten_but_not_files_below_it() -> None:
    env = variables(
        {"name": "HOME", "value": "/tmp"},
        {"name": "FILE", "value": "/tmp/mine.py"},
        volumeMounts=[{"name": "data", "mountPath": "/tmp"}],
    )
    assert (env["HOME"], env["FILE"], env["TMPDIR"]) == ("/disk/data", "/tmp/mine.py", "/disk/data")


def test_the_rendezvous_port_is_replaced_by_a_free_port() -> None:
    assert variables({"name": "MASTER_PORT", "value": "29500"})["MASTER_PORT"] == "15001"
    assert "MASTER_PORT" not in variables()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("metadata.name", "circles-a1-n0"),
        ("metadata.uid", "uid-1"),
        ("metadata.namespace", "default"),
        ("metadata.labels['a/b']", "c"),
        ("metadata.annotations['none']", ""),
        ("spec.nodeName", "local-0"),
        ("status.podIP", "127.0.0.1"),
    ],
)
def test_fields_of_the_downward_api(path: str, value: str) -> None:
    assert variables({"name": "X", "valueFrom": {"fieldRef": {"fieldPath": path}}})["X"] == value


@pytest.mark.parametrize(
    "source", [{"fieldRef": {"fieldPath": "status.qosClass"}}, {"secretKeyRef": {"name": "s", "key": "k"}}]
)
def test_unsupported_sources_of_variables_are_refused(source: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=r"variable X: .* does not exist on this machine"):
        variables({"name": "X", "valueFrom": source})


def test_a_pod_without_a_command_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no command"):
        build(command=[])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("$(A)/x", "1/x"), ("$(B)", "$(B)"), ("$$(A)", "$(A)"), ("$A", "$A"), ("$(A)$(A)", "11"), ("$$", "$")],
)
def test_references_are_expanded(text: str, expected: str) -> None:
    assert expand_references(text, {"A": "1"}) == expected


def test_translation_of_a_pod_that_the_operator_builds() -> None:
    spec = {
        "model": {"base": "a/b"},
        "dataset": {"source": "c/d"},
        "training": {"method": "LoRA", "steps": 1},
        "topology": {"accelerator": "cpu", "nodes": 2},
    }
    job = FineTuneJob.model_validate({"metadata": {"name": "circles", "uid": "1f0c3a2b-x"}, "spec": spec})
    pod = build_pod(job, 3, 0, LOCAL)
    pod["metadata"]["uid"] = "uid-2"
    folders = {volume["name"]: Path("/state") / volume["name"] for volume in pod["spec"]["volumes"]}
    resources = LocalResources(folders, Path("/state/termination"), Path("/tmp/x"), "local-1", 15_002)
    env = build_container(pod, resources, MACHINE, lambda command: (command,)).environment
    assert env["FINETUNE_CHECKPOINT_DIR"] == "/state/checkpoints/default/circles-1f0c3a2b"
    assert env["FINETUNE_CACHE_DIR"] == "/state/cache"
    assert env["FINETUNE_RUN_SPEC"] == "/state/run/run.json"
    assert env["FINETUNE_TERMINATION_LOG"] == "/state/termination"
    assert env["FINETUNE_POD_UID"] == "uid-2"
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("127.0.0.1", "15002")
    assert not any("/finetune/" in value for value in env.values())
