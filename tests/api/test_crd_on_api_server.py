"""A real API server accepts the CRD and reports the same problems as `parse_job`."""

from __future__ import annotations

import re
import uuid
from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_contract.phase import Phase
from finetune_operator.api import crd, yaml_text
from finetune_operator.api.job import API_VERSION
from finetune_operator.api.rules import edits
from finetune_operator.api.rules.spec import RULES
from finetune_operator.api.status import (
    AttemptStatus,
    Bottleneck,
    CheckpointStatus,
    Condition,
    FineTuneJobStatus,
    OutputStatus,
    PerformanceStatus,
    TallyStatus,
    TimeShares,
)
from finetune_operator.api.validate import InvalidJob, Problem, parse_job
from testing.controlplane.api import Api, ControlPlaneApiError
from testing.controlplane.process import wait_for
from testing.controlplane.server import ControlPlane, KubectlError
from tests.api.bad_manifest import BadManifest
from tests.api.bad_manifests import BAD
from tests.api.manifests import FULL, GOOD, SMALLEST, Document, patched
from tests.api.random_jobs import documents, valid_edits
from tests.api.test_edits import ALLOWED, CHANGES, LONGER

pytestmark = pytest.mark.cluster

CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
STATUS = FineTuneJobStatus(
    observed_generation=1,
    phase=Phase.RUNNING,
    reason="Training",
    message="The ranks are training.",
    conditions=(
        Condition(
            type="Running",
            status="True",
            reason="Training",
            message="The ranks are training.",
            last_transition_time=NOW,
            observed_generation=1,
        ),
    ),
    attempt=2,
    step=40,
    total_steps=200,
    progress="20%",
    eta="4m10s",
    loss=0.125,
    images_per_second=3.5,
    performance=PerformanceStatus(
        share_of_peak=0.31,
        teraflops=307,
        utilization=0.97,
        memory_allocated_bytes=2**36,
        memory_reserved_bytes=2**36,
        memory_total_bytes=2**37,
        time_shares=TimeShares(compute=0.75, host=0.25),
        bound_by=Bottleneck.HOST,
        advice=("host-bound: write training.cudaGraphs: auto",),
    ),
    last_checkpoint=CheckpointStatus(step=40, time=NOW, bytes=2**40, attempt=1),
    nodes="3/4",
    preemptions=1,
    failures=0,
    lost_steps=0,
    goodput=0.97,
    start_time=NOW,
    completion_time=NOW,
    attempts=(
        AttemptStatus(
            attempt=1,
            started_at=NOW,
            gang_complete=True,
            training_at=NOW,
            from_step=0,
            to_step=40,
            ended_at=NOW,
            reason="NoticeSaved",
            counts_as="Preemption",
            rank=1,
            pod="circles-a1-n1",
            node="node-1",
            exit_code=75,
            message="saved on a preemption notice",
            lost_steps=0,
        ),
        AttemptStatus(attempt=2, started_at=NOW),
    ),
    tally=TallyStatus(
        failures_since_checkpoint=0, trained_steps=40, trained_seconds=20.5, step_time=NOW, suspended_seconds=0
    ),
    warnings=("a corrupt checkpoint was skipped",),
    outputs=(OutputStatus(format="diffusers", to="/out", bytes=3, sha256="0" * 64),),
)
"""A status with every field."""


@pytest.fixture(scope="module")
def api(control_plane: ControlPlane) -> Api:
    """The API server with the committed CRD."""
    control_plane.kubectl("apply", "--server-side", "-f", "-", stdin=crd.render())
    wait_for("the CRD is established", lambda: condition(control_plane.api, "Established") == "True")
    return control_plane.api


def condition(api: Api, kind: str) -> str | None:
    found = api.get(f"{CRDS}/{crd.NAME}")["status"]["conditions"] or []
    return next((str(each["status"]) for each in found if each["type"] == kind), None)


def jobs(namespace: str) -> str:
    return f"/apis/{API_VERSION}/namespaces/{namespace}/finetunejobs"


def refusal(api: Api, document: Document, namespace: str = "default") -> str:
    """Return the API server's error for a manifest; empty if it is accepted. Nothing is stored."""
    try:
        api.create(f"{jobs(namespace)}?dryRun=All&fieldValidation=Strict", document)
    except ControlPlaneApiError as error:
        return error.message
    return ""


def contains(message: str, problem: Problem) -> bool:
    """Return whether an API server's message contains a problem, possibly without our advice."""
    if problem.message in message:
        return True
    # The reason in parentheses is ours, too.
    text = re.sub(r" \([^)]*\)$", "", problem.message.split("; ")[0])
    return re.sub(r"^Invalid value: .*: (?=should|must)", "", text) in message


def test_definition_is_accepted_unchanged(api: Api) -> None:
    assert condition(api, "NamesAccepted") == "True"
    assert condition(api, "NonStructuralSchema") in (None, "False")
    stored = api.get(f"{CRDS}/{crd.NAME}")["spec"]["versions"][0]
    assert stored["schema"]["openAPIV3Schema"] == crd.job_schema()
    assert (
        stored["additionalPrinterColumns"]
        == crd.custom_resource_definition()["spec"]["versions"][0]["additionalPrinterColumns"]
    )


@pytest.mark.parametrize("document", GOOD.values(), ids=GOOD.keys())
def test_valid_manifests_are_accepted(api: Api, document: Document) -> None:
    assert refusal(api, document) == ""


@pytest.mark.parametrize("bad", [bad for bad in BAD if bad.reaches_schema], ids=lambda bad: bad.name)
def test_invalid_manifests_are_refused_with_the_same_message(api: Api, bad: BadManifest) -> None:
    message = refusal(api, bad.document)
    assert bad.field in message
    with pytest.raises(InvalidJob) as caught:
        parse_job(bad.document)
    assert [problem for problem in caught.value.problems if not contains(message, problem)] == []


@pytest.mark.parametrize("bad", [bad for bad in BAD if not bad.reaches_schema], ids=lambda bad: bad.name)
def test_other_objects_are_refused_by_kubectl(api: Api, control_plane: ControlPlane, bad: BadManifest) -> None:
    with pytest.raises(KubectlError):
        control_plane.kubectl("apply", "--dry-run=server", "-f", "-", stdin=yaml_text.dump(bad.document))


def test_kubectl_apply_prints_our_message(api: Api, control_plane: ControlPlane) -> None:
    document = patched(SMALLEST, {"spec.training.epochs": 3, "spec.recovery.hangTimeout": "soon"})
    with pytest.raises(KubectlError) as caught:
        control_plane.kubectl("apply", "-f", "-", stdin=yaml_text.dump(document))
    problem = "spec: Forbidden: spec.training.epochs: steps and epochs exclude each other; leave steps out"
    assert problem in caught.value.stderr
    assert 'spec.recovery.hangTimeout: Invalid value: "soon": hangTimeout is not a duration' in caught.value.stderr


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=documents())
def test_api_server_and_python_agree_on_random_manifests(api: Api, document: Document) -> None:
    try:
        parse_job(document)
        ours: set[str] = set()
    except InvalidJob as error:
        ours = {problem.message for problem in error.problems}
    message = refusal(api, document)
    theirs = {rule.message for rule in RULES if rule.message in message}
    assert theirs == ours
    assert bool(message) == bool(ours), message


@pytest.mark.parametrize("document", GOOD.values(), ids=GOOD.keys())
def test_api_server_and_python_set_the_same_defaults(api: Api, document: Document) -> None:
    stored = api.create(f"{jobs('default')}?dryRun=All", document)
    expected = parse_job(document).spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert stored["spec"] == expected
    assert parse_job(stored).spec == parse_job(document).spec


def test_status_is_stored_completely_and_shown_in_columns(
    api: Api, control_plane: ControlPlane, namespace: str
) -> None:
    api.create(jobs(namespace), FULL)
    assert (
        columns(control_plane, namespace)
        == "NAME METHOD PHASE STEP PROGRESS ETA CHECKPOINT NODES PREEMPTIONS FAILURES AGE"
    )
    written = STATUS.model_dump(mode="json", by_alias=True, exclude_none=True)
    stored = api.patch(f"{jobs(namespace)}/circles/status", {"status": written})
    assert stored["status"] == written
    assert parse_job(stored).status == STATUS
    header, row = control_plane.kubectl("get", "ftj", "-n", namespace, "-o", "wide").splitlines()
    assert header.split()[-5:] == ["LOSS", "IMAGES/S", "GOODPUT", "REASON", "MESSAGE"]
    cells = row.split()
    assert cells[:6] == ["circles", "DreamBoothLoRA", "Running", "40", "20%", "4m10s"]
    assert re.fullmatch(r"\d+[dh]\w*|-?\d+.*", cells[6])
    assert cells[7:10] == ["3/4", "1", "0"]
    assert row.endswith("The ranks are training.")
    assert cells[11:14] == ["0.125", "3.5", "0.97"]


def columns(control_plane: ControlPlane, namespace: str) -> str:
    return " ".join(control_plane.kubectl("get", "ftj", "-n", namespace).splitlines()[0].split())


def test_kubectl_get_all_lists_jobs(api: Api, control_plane: ControlPlane, namespace: str) -> None:
    api.create(jobs(namespace), SMALLEST)

    def listed() -> bool:
        # kubectl finds the resource by discovery, which lags behind the definition.
        return "finetunejob.finetune-operator.io/circles" in control_plane.kubectl("get", "all", "-n", namespace)

    wait_for("kubectl get all lists the job", listed)


@pytest.mark.parametrize("steps", ["200.0", "2e2", "200"])
def test_integer_may_be_written_as_a_float(api: Api, control_plane: ControlPlane, steps: str) -> None:
    text = yaml_text.dump(SMALLEST).replace("steps: 200", f"steps: {steps}")
    stored = control_plane.kubectl("apply", "--dry-run=server", "-o", "json", "-f", "-", stdin=text)
    assert yaml_text.load(stored)["spec"]["training"]["steps"] == 200
    assert parse_job(yaml_text.load(text)).spec.training.steps == 200


@pytest.mark.parametrize("steps", ["200.5", "1e30", "'200'"])
def test_non_integer_is_refused_for_an_integer_field(api: Api, control_plane: ControlPlane, steps: str) -> None:
    text = yaml_text.dump(SMALLEST).replace("steps: 200", f"steps: {steps}")
    with pytest.raises(KubectlError, match=r"spec\.training\.steps"):
        control_plane.kubectl("apply", "--dry-run=server", "-f", "-", stdin=text)
    with pytest.raises(InvalidJob, match=r"spec\.training\.steps"):
        parse_job(yaml_text.load(text))


def edit(api: Api, namespace: str, document: Document) -> str:
    """Return the API server's error for an edit of a stored job; empty if it is accepted. Nothing is stored."""
    path = f"{jobs(namespace)}/{document['metadata']['name']}"
    stored = api.get(path)
    try:
        api.request("PUT", f"{path}?dryRun=All", {**document, "metadata": stored["metadata"]})
    except ControlPlaneApiError as error:
        return error.message
    return ""


WRITTEN = [{"format": "webui", "to": "/out", "bytes": 1}]


@pytest.fixture
def begun(api: Api, namespace: str) -> str:
    """A namespace with the job FULL, whose first attempt has begun and written the outputs."""
    api.create(jobs(namespace), FULL)
    api.patch(f"{jobs(namespace)}/circles/status", {"status": {"attempt": 1, "outputs": WRITTEN}})
    return namespace


def test_fixed_fields_are_refused_after_the_first_attempt_began(api: Api, begun: str) -> None:
    for path, patch in CHANGES.items():
        edited = patched(FULL, patch)
        stored = parse_job({**FULL, "status": {"attempt": 1, "outputs": WRITTEN}})
        expected = edits.forbidden_edits(stored, parse_job(edited))
        message = edit(api, begun, edited)
        assert path in [fixed.path for fixed in expected]
        for fixed in edits.FIXED:
            assert (f"{fixed.path}: {fixed.message}" in message) == (fixed in expected), message


def test_length_and_outputs_may_change_until_the_outputs_are_written(api: Api, namespace: str) -> None:
    api.create(jobs(namespace), FULL)
    api.patch(f"{jobs(namespace)}/circles/status", {"status": {"attempt": 1}})
    assert [edit(api, namespace, patched(FULL, patch)) for patch in LONGER.values()] == ["", ""]
    api.patch(f"{jobs(namespace)}/circles/status", {"status": {"outputs": WRITTEN}})
    for path, patch in LONGER.items():
        assert f"{path}: {path.rpartition('.')[2]} cannot change" in edit(api, namespace, patched(FULL, patch))


def test_edit_that_includes_a_status_is_refused_as_well(api: Api, begun: str) -> None:
    """The rules skip writes that change status.writes; an edit of the spec cannot change it."""
    api.patch(f"{jobs(begun)}/circles/status", {"status": {"writes": 3}})
    edited = patched(FULL, {"spec.training.seed": 77}) | {"status": {"attempt": 1, "writes": 4}}
    assert "spec.training: training cannot change" in edit(api, begun, edited)


def test_job_of_an_older_definition_may_change_except_for_its_spec(
    api: Api, begun: str, control_plane: ControlPlane
) -> None:
    """A stored job that breaks a rule of a newer definition keeps its metadata writable, and its spec can be fixed."""
    strict = crd.custom_resource_definition()
    rules = strict["spec"]["versions"][0]["schema"]["openAPIV3Schema"].pop("x-kubernetes-validations")
    job = f"{jobs(begun)}/older"
    broken = patched(SMALLEST, {"metadata": {"name": "older"}, "spec.training.epochs": 3})
    try:
        control_plane.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=yaml_text.dump(strict))
        wait_for("the rules are gone", lambda: refusal(api, broken) == "")
        api.create(jobs(begun), broken)
    finally:
        strict["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["x-kubernetes-validations"] = rules
        control_plane.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=yaml_text.dump(strict))
    wait_for("the rules are back", lambda: refusal(api, broken) != "")
    api.patch(f"{job}/status", {"status": {"writes": 1}})
    api.patch(job, {"metadata": {"labels": {"team": "vision"}}})
    with pytest.raises(ControlPlaneApiError, match="steps and epochs exclude each other"):
        api.patch(job, {"spec": {"suspend": True}})
    api.patch(job, {"spec": {"training": {"epochs": None}}})


def test_changeable_fields_are_accepted_at_any_time(api: Api, begun: str) -> None:
    assert {path: edit(api, begun, patched(FULL, patch)) for path, patch in ALLOWED.items()} == dict.fromkeys(
        ALLOWED, ""
    )


def test_before_the_first_attempt_only_managed_by_is_fixed(api: Api, namespace: str) -> None:
    api.create(jobs(namespace), FULL)
    for path, patch in CHANGES.items():
        assert bool(edit(api, namespace, patched(FULL, patch))) == (path == "spec.managedBy"), path


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edited=valid_edits(), attempt=st.integers(0, 2))
def test_api_server_and_python_agree_on_random_edits(
    api: Api, namespace: str, edited: tuple[Document, Document], attempt: int
) -> None:
    name = f"job-{uuid.uuid4().hex[:12]}"
    before, after = (patched(document, {"metadata": {"name": name}}) for document in edited)
    api.create(jobs(namespace), before)
    stored = api.patch(f"{jobs(namespace)}/{name}/status", {"status": {"attempt": attempt}})
    ours = edits.forbidden_edits(parse_job(stored), parse_job(after))
    message = edit(api, namespace, after)
    assert [fixed for fixed in edits.FIXED if fixed.message in message] == ours
    assert bool(message) == bool(ours), message


def test_kubectl_apply_reports_the_remedy_of_a_forbidden_edit(
    api: Api, begun: str, control_plane: ControlPlane
) -> None:
    document = patched(FULL, {"spec.training.seed": 4, "metadata.namespace": begun})
    with pytest.raises(KubectlError) as caught:
        control_plane.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=yaml_text.dump(document))
    assert (
        "spec: Forbidden: spec.training: training cannot change after the first attempt has begun: the checkpoints "
        "depend on the old settings; write the change into a new job with another name" in caught.value.stderr
    )


def test_unknown_phase_is_refused(api: Api, namespace: str) -> None:
    api.create(jobs(namespace), SMALLEST)
    with pytest.raises(ControlPlaneApiError, match=r"status\.phase: Unsupported value"):
        api.patch(f"{jobs(namespace)}/circles/status", {"status": {"phase": "Resting"}})


def test_kubectl_explain_describes_fields(api: Api, control_plane: ControlPlane) -> None:
    wait_for("the schema is published", lambda: "batchSize" in control_plane.kubectl("explain", "ftj.spec.training"))
    text = control_plane.kubectl("explain", "ftj.spec.training")
    assert "Samples in one forward pass of one rank" in text
    text = control_plane.kubectl("explain", "ftj.spec.training.method")
    assert "Fine-tuning method; required" in text
    assert "DreamBoothLoRA" in text
