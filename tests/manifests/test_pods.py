"""The pod manifest: identity, environment, volumes, resources, security, and changes by podTemplate."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_contract import environment
from finetune_operator.api import labels
from finetune_operator.api.job import FineTuneJob
from finetune_operator.manifests import PodOptions, build_pod, hash_template
from finetune_operator.manifests.merge import MergeError
from finetune_operator.settings import Settings
from tests.plan.fake_cluster import make_job

SETTINGS = Settings(coordinator_url="https://coordinator:8443", coordinator_ca_config="finetune-ca")
CLAIM = {"storage": {"persistentVolumeClaim": {"claimName": "shared"}}}


def pod_of(attempt: int = 2, node_rank: int = 1, settings: Settings = SETTINGS, **spec: Any) -> dict[str, Any]:
    return build_pod(make_job(**spec), attempt, node_rank, settings)


def trainer(pod: dict[str, Any]) -> dict[str, Any]:
    containers = {container["name"]: container for container in pod["spec"]["containers"]}
    found: dict[str, Any] = containers["trainer"]
    return found


def env_of(pod: dict[str, Any]) -> dict[str, Any]:
    variables = trainer(pod)["env"]
    values = {variable["name"]: variable.get("value", variable.get("valueFrom")) for variable in variables}
    assert len(values) == len(variables)
    return values


def volume(pod: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(volume for volume in pod["spec"]["volumes"] if volume["name"] == name)
    return found


def test_identity() -> None:
    pod = pod_of()
    assert (pod["apiVersion"], pod["kind"]) == ("v1", "Pod")
    assert pod["metadata"]["name"] == pod["spec"]["hostname"] == "circles-a2-n1"
    assert pod["metadata"]["namespace"] == "default"
    assert pod["spec"]["restartPolicy"] == "Never"
    assert pod["spec"]["subdomain"] == "circles"
    assert pod["metadata"]["labels"].pop(labels.TEMPLATE) == hash_template(make_job().spec)
    assert pod["metadata"]["labels"] == {
        "app.kubernetes.io/managed-by": "finetune-operator",
        "finetune-operator.io/job": "circles",
        "finetune-operator.io/attempt": "2",
        "finetune-operator.io/node-rank": "1",
    }
    (owner,) = pod["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"]) == ("FineTuneJob", "circles", "1f0c3a2b-0000")
    assert owner["controller"] is True


def test_every_variable_of_the_contract_is_set() -> None:
    names = {value for name, value in vars(environment).items() if name.isupper()} - {
        # Set by the supervisor, only for some pods, or only in benchmarks.
        environment.REPORT_FD,
        environment.STANDBY,
        environment.MTBF_SECONDS,
        environment.CHECK_DEVICES,
        environment.MASTER_NAME,
        environment.FORK_SERVER,
        environment.COMMUNICATION_CPUS,
        environment.HELPER_CPUS,
        environment.MIN_PART_BYTES,
        environment.RETRY_SECONDS,
        environment.RANK_ORDERED,
        environment.COUNT_AFTER_SECONDS,
        # Set by users, for a device that the trainer does not know.
        environment.PEAK_TERAFLOPS,
        # Set only for a bucket or a scratch disk.
        environment.BUCKET,
        environment.S3_ENDPOINT,
        environment.SCRATCH_DIR,
        # Set only in export pods.
        environment.EXPORT,
        # Set only for outputs with a Secret.
        environment.OUTPUT_SECRETS,
        # Set only for a script in a ConfigMap, and by the images.
        environment.SCRIPT,
        environment.EXAMPLES,
    }
    assert names <= env_of(pod_of(node_rank=0)).keys()


def test_environment() -> None:
    topology = {"accelerator": "cpu", "nodes": 3, "processesPerNode": 2}
    env = env_of(pod_of(topology=topology, recovery={"noticeSeconds": 45}))
    assert env[environment.ATTEMPT] == "2"
    assert env[environment.NODE_RANK] == "1"
    assert (env[environment.NUM_NODES], env[environment.PROCESSES_PER_NODE]) == ("3", "2")
    assert environment.MASTER_ADDR not in env
    assert env[environment.MASTER_PORT] == "29500"
    assert env[environment.BACKEND] == "auto"
    assert env[environment.GRACE_SECONDS] == "45"
    assert env[environment.CHECKPOINT_DIR] == "/finetune/storage/default/circles-1f0c3a2b"
    assert env[environment.POD_UID] == {"fieldRef": {"fieldPath": "metadata.uid"}}
    assert env[environment.COORDINATOR_URL] == "https://coordinator:8443"
    assert env[environment.COORDINATOR_CA] == "/finetune/token/ca.crt"


@pytest.mark.parametrize(
    ("node_rank", "first_pod", "is_first"),
    [(0, (2, 0), True), (1, (2, 0), False), (0, (1, 3), False), (2, (2, 2), True)],
)
def test_only_the_pod_of_rank_0_knows_its_address(node_rank: int, first_pod: tuple[int, int], is_first: bool) -> None:
    job = make_job(topology={"accelerator": "cpu", "nodes": 3})
    env = env_of(build_pod(job, 2, node_rank, SETTINGS, PodOptions(num_nodes=3, first_pod=first_pod)))
    own = {"fieldRef": {"fieldPath": "status.podIP"}}
    assert env.get(environment.MASTER_ADDR) == (own if is_first else None)
    # For a pod that cannot reach the coordinator.
    name = "circles-a{}-n{}.circles.default.svc".format(*first_pod)
    assert env.get(environment.MASTER_NAME) == (None if is_first else name)


@pytest.mark.parametrize("node_rank", [0, 1])
def test_pods_of_a_job_with_a_service_know_the_name_of_rank_0(node_rank: int) -> None:
    pod = build_pod(make_job(), 2, node_rank, SETTINGS, PodOptions(first_pod=(1, 0), has_names=True))
    assert env_of(pod)[environment.MASTER_ADDR] == "circles-a1-n0.circles.default.svc"
    assert environment.MASTER_NAME not in env_of(pod)


def test_every_path_in_the_environment_is_mounted() -> None:
    pod = pod_of()
    mounts = [mount["mountPath"] for mount in trainer(pod)["volumeMounts"]]
    for name in (
        environment.RUN_SPEC,
        environment.COORDINATOR_TOKEN,
        environment.COORDINATOR_CA,
        environment.CHECKPOINT_DIR,
        environment.CACHE_DIR,
        "HOME",
    ):
        path = env_of(pod)[name]
        assert any(path == mount or path.startswith(mount + "/") for mount in mounts), name
    assert env_of(pod)[environment.TERMINATION_LOG] == trainer(pod)["terminationMessagePath"]


def test_mounts_and_volumes_match() -> None:
    pod = pod_of()
    mounted = [mount["name"] for mount in trainer(pod)["volumeMounts"]]
    assert mounted == [volume["name"] for volume in pod["spec"]["volumes"]]


@pytest.mark.parametrize(
    ("storage", "source"),
    [
        (None, {"emptyDir": {}}),
        ({"persistentVolumeClaim": {"claimName": "c"}}, {"persistentVolumeClaim": {"claimName": "c"}}),
        ({"hostPath": {"path": "/mnt"}}, {"hostPath": {"path": "/mnt", "type": "DirectoryOrCreate"}}),
        ({"nfs": {"server": "s", "path": "/p"}}, {"nfs": {"server": "s", "path": "/p"}}),
    ],
)
def test_storage(storage: dict[str, Any] | None, source: dict[str, Any]) -> None:
    checkpoint = {"storage": storage} if storage else {}
    assert volume(pod_of(checkpoint=checkpoint), "checkpoints") == {"name": "checkpoints", **source}


def test_certificate_authority_comes_from_the_jobs_config_map_if_the_operator_stores_it_there() -> None:
    pod = pod_of(settings=Settings(coordinator_url="https://coordinator:8443", coordinator_ca_in_run=True))
    _, ca = volume(pod, "token")["projected"]["sources"]
    assert ca["configMap"] == {"name": "circles-run", "items": [{"key": "ca.crt", "path": "ca.crt"}]}
    assert env_of(pod)[environment.COORDINATOR_CA] == "/finetune/token/ca.crt"


def test_cache_is_on_the_storage_unless_it_has_a_claim() -> None:
    assert env_of(pod_of())[environment.CACHE_DIR] == "/finetune/storage/.cache"
    shared = pod_of(settings=Settings(cache_claim="cache"))
    assert env_of(shared)[environment.CACHE_DIR] == "/finetune/cache"
    assert volume(shared, "cache")["persistentVolumeClaim"] == {"claimName": "cache"}


def test_token_is_bound_to_the_coordinator() -> None:
    token, ca = volume(pod_of(), "token")["projected"]["sources"]
    assert token["serviceAccountToken"] == {
        "audience": "finetune-coordinator",
        "expirationSeconds": 3600,
        "path": "token",
    }
    assert ca["configMap"]["name"] == "finetune-ca"
    assert pod_of()["spec"]["automountServiceAccountToken"] is False


def test_no_token_without_a_coordinator() -> None:
    pod = pod_of(settings=Settings())
    assert "token" not in [volume["name"] for volume in pod["spec"]["volumes"]]
    assert env_of(pod)[environment.COORDINATOR_TOKEN] == ""


@pytest.mark.parametrize(
    ("topology", "image", "backend", "resources"),
    [
        ({"accelerator": "cpu"}, "trainer-cpu", "auto", {}),
        ({"accelerator": "cpu", "resources": {"cpu": 8, "memory": "32Gi"}}, "trainer-cpu", "auto", {"cpu": "8"}),
        ({"accelerator": "cpu", "cpu": {"backend": "ccl"}}, "trainer-cpu-intel", "ccl", {}),
        ({"accelerator": "cpu", "cpu": {"ipex": True}}, "trainer-cpu-intel", "auto", {}),
        ({"accelerator": "cpu", "cpu": {"ipex": "off"}}, "trainer-cpu", "auto", {}),
        ({"accelerator": "gpu", "processesPerNode": 4}, "trainer-cuda", "nccl", {"nvidia.com/gpu": "4"}),
        ({"accelerator": "gpu", "resources": {"nvidia.com/gpu": 1}}, "trainer-cuda", "nccl", {"nvidia.com/gpu": "1"}),
    ],
)
def test_topologies(topology: dict[str, Any], image: str, backend: str, resources: dict[str, str]) -> None:
    pod = pod_of(topology=topology)
    assert f"/{image}:" in trainer(pod)["image"]
    assert env_of(pod)[environment.BACKEND] == backend
    found = trainer(pod)["resources"]
    assert found["requests"] == {"cpu": env_of(pod)[environment.PROCESSES_PER_NODE]} | found.get("limits", {})
    assert resources.items() <= found.get("limits", {}).items()


def test_cores_are_requested_by_default() -> None:
    topology = {"accelerator": "cpu", "processesPerNode": 4, "resources": {"memory": "8Gi"}}
    assert trainer(pod_of(topology=topology))["resources"] == {
        "requests": {"memory": "8Gi", "cpu": "4"},
        "limits": {"memory": "8Gi"},
    }
    assert trainer(pod_of(settings=Settings(cores_per_rank=0)))["resources"] == {}


@pytest.mark.parametrize(
    ("topology", "size"),
    [
        ({"accelerator": "cpu"}, "4096Mi"),
        ({"accelerator": "gpu", "processesPerNode": 8}, "32768Mi"),
        ({"accelerator": "gpu", "resources": {"memory": "64Gi"}}, "32768Mi"),
        ({"accelerator": "cpu", "resources": {"memory": "1e9"}}, "476Mi"),
        ({"accelerator": "cpu", "resources": {"memory": 1}}, "1Mi"),
    ],
)
def test_shared_memory_is_limited(topology: dict[str, Any], size: str) -> None:
    shared = volume(pod_of(topology=topology), "shared-memory")
    assert shared["emptyDir"] == {"medium": "Memory", "sizeLimit": size}


def test_environment_of_the_communication_libraries() -> None:
    gpu = env_of(pod_of(topology={"accelerator": "gpu"}))
    assert gpu["NCCL_DEBUG"] == "WARN"
    # The surviving rank of a lost peer must be able to save.
    assert (gpu["TORCH_NCCL_ASYNC_ERROR_HANDLING"], gpu["TORCH_NCCL_ENABLE_MONITORING"]) == ("0", "0")
    assert not [name for name in gpu if name.startswith("FI_")]
    # Those of oneCCL depend on the node: the supervisor sets them.
    ccl = env_of(pod_of(topology={"accelerator": "cpu", "processesPerNode": 2, "cpu": {"backend": "ccl"}}))
    for env in (ccl, env_of(pod_of())):
        assert not [name for name in env if name.startswith(("NCCL", "CCL", "FI_"))]


@pytest.mark.parametrize(("pages", "use"), [({}, "0"), ({"hugepages-2Mi": "5Gi"}, None)])
def test_environment_of_elastic_fabric_adapters(pages: dict[str, Any], use: str | None) -> None:
    resources = {"memory": "256Gi", "vpc.amazonaws.com/efa": 4, **pages}
    pod = pod_of(topology={"accelerator": "gpu", "nodes": 2, "processesPerNode": 8, "resources": resources})
    assert trainer(pod)["resources"]["limits"] == {
        "nvidia.com/gpu": "8",
        "memory": "256Gi",
        "vpc.amazonaws.com/efa": "4",
        **{name: str(amount) for name, amount in pages.items()},
    }
    env = env_of(pod)
    assert (env["FI_PROVIDER"], env["NCCL_SOCKET_IFNAME"]) == ("efa", "^docker,lo")
    assert env.get("FI_EFA_USE_HUGE_PAGE") == use
    # It would abort the ranks on machines whose adapters have no RDMA.
    assert "FI_EFA_USE_DEVICE_RDMA" not in env


def test_no_environment_of_adapters_without_any() -> None:
    topology = {"accelerator": "gpu", "resources": {"vpc.amazonaws.com/efa": 0}}
    assert "FI_PROVIDER" not in env_of(pod_of(topology=topology))


def test_restricted_pod_security() -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted"""
    pod = pod_of(checkpoint=CLAIM)
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    assert pod["spec"]["securityContext"]["runAsUser"] > 0
    assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert trainer(pod)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "projected"}
    assert {key for volume in pod["spec"]["volumes"] for key in volume} - {"name"} <= allowed


def test_grace_secrets_and_priority() -> None:
    pod = pod_of(recovery={"noticeSeconds": 45}, secrets=[{"name": "hub"}], priorityClassName="high")
    assert pod["spec"]["terminationGracePeriodSeconds"] == 45
    assert trainer(pod)["envFrom"] == [{"secretRef": {"name": "hub"}}]
    assert pod["spec"]["priorityClassName"] == "high"
    assert "envFrom" not in trainer(pod_of())
    assert "priorityClassName" not in pod_of()["spec"]


def test_pod_template_is_merged() -> None:
    template = {
        "metadata": {"labels": {"team": "vision"}, "annotations": {"a": "b"}},
        "spec": {
            "nodeSelector": {"zone": "a"},
            "tolerations": [{"key": "spot"}],
            "volumes": [{"name": "scratch", "ephemeral": {}}, {"name": "data", "persistentVolumeClaim": {}}],
            "containers": [
                {"name": "trainer", "image": "mine", "env": [{"name": "HOME", "value": "/home/me"}]},
                {"name": "sidecar", "image": "s"},
            ],
        },
    }
    pod = pod_of(podTemplate=template)
    assert pod["metadata"]["labels"]["team"] == "vision"
    assert pod["metadata"]["annotations"] == {"a": "b"}
    assert pod["spec"]["nodeSelector"] == {"zone": "a"}
    assert trainer(pod)["image"] == "mine"
    assert trainer(pod)["command"] == ["finetune-supervisor"]
    assert env_of(pod)["HOME"] == "/home/me"
    assert env_of(pod)[environment.ATTEMPT] == "2"
    assert volume(pod, "scratch") == {"name": "scratch", "ephemeral": {}}
    assert [container["name"] for container in pod["spec"]["containers"]] == ["trainer", "sidecar"]


def test_pod_template_cannot_change_the_identity() -> None:
    template = {
        "metadata": {
            "name": "other",
            "namespace": "kube-system",
            "labels": {"finetune-operator.io/attempt": "9", "finetune-operator.io/job": None},
            "ownerReferences": [],
        },
        "spec": {"hostname": "other", "subdomain": None, "restartPolicy": "Always"},
    }
    pods = (pod_of(podTemplate=template), pod_of())
    # A pod's own hash of the template tells the two apart.
    hashes = {pod["metadata"]["labels"].pop(labels.TEMPLATE) for pod in pods}
    assert pods[0] == pods[1]
    assert len(hashes) == 2


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            {"containers": [{"name": "trainer", "image": "mine"}]},
            "containers is not a field of a PodTemplateSpec; write",
        ),
        (
            {"spec": {"containers": [{"name": "trainer", "$patch": "delete"}]}},
            "removes the container trainer; keep",
        ),
        ({"spec": {"containers": "trainer"}}, "removes the container trainer"),
        ({"spec": {"containers": None}}, "removes the container trainer"),
        (
            {"spec": {"$patch": "replace", "containers": [{"image": "mine"}, "trainer"]}},
            "removes the container trainer",
        ),
        ({"spec": "nodeSelector"}, "removes the container trainer"),
        ({"spec": {"$patch": "replace", "containers": [{"name": "other"}]}}, "removes the container trainer"),
    ],
)
def test_pod_template_that_removes_the_trainer_is_refused(template: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        pod_of(podTemplate=template)


def test_manifest_is_deterministic_and_plain_json() -> None:
    job: FineTuneJob = make_job(checkpoint=CLAIM)
    one, other = (build_pod(job, 1, 0, SETTINGS) for _ in range(2))
    assert json.dumps(one) == json.dumps(other)
    assert job == make_job(checkpoint=CLAIM)


def test_bucket_is_in_the_environment_and_the_volume_is_local() -> None:
    bucket = {"url": "s3://models/runs/", "endpoint": "https://s3.example.com"}
    pod = pod_of(checkpoint={"storage": {"bucket": bucket}})
    env = env_of(pod)
    assert env[environment.BUCKET] == "s3://models/runs/default/circles-1f0c3a2b"
    assert env[environment.S3_ENDPOINT] == "https://s3.example.com"
    assert volume(pod, "checkpoints")["emptyDir"] == {}
    public = env_of(pod_of(checkpoint={"storage": {"bucket": {"url": "gs://models"}}}))
    assert public[environment.BUCKET] == "gs://models/default/circles-1f0c3a2b"
    assert environment.S3_ENDPOINT not in public


def test_scratch_is_an_empty_dir_of_the_node() -> None:
    pod = pod_of(checkpoint={**CLAIM, "scratch": {"sizeLimit": "50Gi"}})
    assert volume(pod, "node-disk")["emptyDir"] == {"sizeLimit": "50Gi"}
    assert env_of(pod)[environment.SCRATCH_DIR] == "/finetune/scratch/default/circles-1f0c3a2b"
    assert volume(pod_of(checkpoint={**CLAIM, "scratch": {}}), "node-disk")["emptyDir"] == {}


def test_a_script_of_a_config_map_is_mounted() -> None:
    script = {"configMap": {"name": "mine", "key": "a.py"}, "env": {"A": "1"}}
    pod = pod_of(training={"script": script})
    assert env_of(pod)[environment.SCRIPT] == "/finetune/script/a.py"
    assert volume(pod, "script")["configMap"] == {"name": "mine", "items": [{"key": "a.py", "path": "a.py"}]}
    (mount,) = [each for each in trainer(pod)["volumeMounts"] if each["name"] == "script"]
    assert mount == {"name": "script", "mountPath": "/finetune/script", "readOnly": True}


def test_a_script_can_name_its_image() -> None:
    pod = pod_of(training={"script": {"path": "/app/train.py", "image": "mine/trainer:1"}})
    assert trainer(pod)["image"] == "mine/trainer:1"
    assert environment.SCRIPT not in env_of(pod)


def test_only_the_pod_that_writes_the_outputs_can_read_their_secrets() -> None:
    outputs = [
        {"format": "diffusers", "to": "s3://models/lora", "secret": {"name": "bucket"}},
        {"format": "kohya", "to": "hub://me/lora", "secret": {"name": "hub-token"}},
        {"format": "webui", "to": "lora"},
    ]
    job = make_job(outputs=outputs, topology={"nodes": 2})
    first, second = (build_pod(job, 1, rank, Settings()) for rank in (0, 1))
    sources = {volume["secret"]["secretName"] for volume in first["spec"]["volumes"] if "secret" in volume}
    assert sources == {"bucket", "hub-token"}
    mounts = {mount["mountPath"]: mount for mount in first["spec"]["containers"][0]["volumeMounts"]}
    assert mounts["/finetune/output-secrets/hub-token"]["readOnly"] is True
    assert env_of(first)["FINETUNE_OUTPUT_SECRETS"] == "/finetune/output-secrets"
    assert not any("secret" in volume for volume in second["spec"]["volumes"])
    assert "envFrom" not in first["spec"]["containers"][0]


@pytest.mark.parametrize(
    "edit",
    [
        {"topology": {"minNodes": 1, "maxNodes": 2}},
        {"recovery": {"spot": {"fallbackAfter": "1h"}}, "topology": {"nodes": 2}},
    ],
)
def test_every_pod_that_may_become_rank_0_can_read_the_secrets_of_outputs(edit: dict[str, Any]) -> None:
    outputs = [{"format": "diffusers", "to": "s3://models/lora", "secret": {"name": "bucket"}}]
    pod = build_pod(make_job(outputs=outputs, **edit), 1, 1, Settings())
    assert any("secret" in volume for volume in pod["spec"]["volumes"])
