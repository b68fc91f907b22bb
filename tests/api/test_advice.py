"""Every advice works: a manifest that is edited as a message says is accepted by all checks of a job."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from pydantic.alias_generators import to_camel

from finetune_operator.api import crd, duration, messages
from finetune_operator.api.flags import FLAGS
from finetune_operator.api.quantity import parse_quantity
from finetune_operator.api.rules import edits
from finetune_operator.api.rules.spec import RULES
from finetune_operator.api.rules.supported import MISSING, find_missing
from finetune_operator.api.validate import InvalidJob, broken_rules, parse_job
from finetune_operator.manifests import build_pod
from finetune_operator.manifests.merge import MergeError
from finetune_operator.plan.policies.acceptance import (
    NO_CLAIMS,
    NO_EXPORT_IMAGE,
    NO_GANGS,
    NO_QUEUES,
    NO_RACKS,
    NO_STORAGE,
    find_unsupported,
)
from finetune_operator.settings import Settings
from tests.api.advice import ADVICE, STORAGES, Advice, Edit, removed
from tests.api.bad_manifest import BadManifest
from tests.api.bad_manifests import BAD
from tests.api.flag_values import FLAG_VALUES
from tests.api.manifests import FULL, GOOD, SMALLEST, Document, patched
from tests.api.test_edits import CHANGES
from tests.api.unsupported import UNSUPPORTED, Unsupported

LOCAL = Settings(require_storage=False)
CLUSTER = Settings(require_storage=True)
REPEATED_VALUE = re.compile(r"^(Invalid|Unsupported) value: .*?: (?=should|must|supported)|^Too (long|many): (\d+: )?")
EXPLANATION = re.compile(r"(?<=^write )(\w+) \(.*\)$")
CONNECTIVES = frozenset(
    {"write", "leave", "out", "or", "and", "e.g.", "a", "instead", "with", "method", "for", "this", "operator"}
    | {"should", "must", "may", "be", "have", "match", "supported", "values:", "the", "fields", "here", "are"}
)
"""Words of an advice that recommend nothing by themselves."""


def refusals(document: Document, settings: Settings = LOCAL) -> list[str]:
    """Return everything that the checks of a job report about a manifest; empty if it is accepted."""
    try:
        job = parse_job(document)
    except InvalidJob as error:
        return error.messages
    return [*map(str, broken_rules(job)), *find_missing(job.spec), *find_unsupported(job, settings)]


def advice_in(message: str) -> str:
    """Return the part of a message that contains the advice."""
    _, separator, advice = message.partition("; ")
    return EXPLANATION.sub(r"\1", advice) if separator else REPEATED_VALUE.sub("", message)


def untried_words(message: str, advice: Advice) -> list[str]:
    """Return the parts of the advice in a message that no edit covers."""
    rest = advice_in(message)
    for part in sorted(advice, key=len, reverse=True):
        assert part in rest, f"{part!r} is not part of {rest!r}"
        rest = rest.replace(part, " ")
    return [word for word in re.findall(r"[^\s,;()]+", rest) if word not in CONNECTIVES]


def message_of(bad: BadManifest) -> str:
    with pytest.raises(InvalidJob) as caught:
        parse_job(bad.document)
    (problem,) = caught.value.problems
    return problem.message


BAD_BY_NAME = {bad.name: bad for bad in BAD}
FOLLOWED = [(name, part, edit) for name, advice in ADVICE.items() for part, edit in advice.items()]


def test_every_rule_has_its_advice_tried() -> None:
    assert ADVICE.keys() == BAD_BY_NAME.keys(), "add the row of the manifest to ADVICE (tests/api/advice.py)"
    broken = {message_of(bad) for bad in BAD}
    untried = [f"{rule.path}: {rule.message}" for rule in RULES if rule.message not in broken]
    assert untried == [], "add a manifest to BAD (tests/api/bad_manifests.py) and its row to ADVICE"


def test_every_hint_has_its_advice_tried() -> None:
    reported = " ".join(map(message_of, BAD))
    assert [hint for hint in messages._HINTS.values() if hint not in reported] == []


@pytest.mark.parametrize("name", ADVICE)
def test_every_value_that_a_message_recommends_is_tried(name: str) -> None:
    assert untried_words(message_of(BAD_BY_NAME[name]), ADVICE[name]) == []


@pytest.mark.parametrize(("name", "part", "edit"), FOLLOWED, ids=lambda value: str(value)[:40])
def test_manifest_that_follows_the_advice_is_accepted(name: str, part: str, edit: Edit) -> None:
    bad = BAD_BY_NAME[name]
    known = refusals(GOOD[bad.base])
    assert [message for message in refusals(patched(bad.document, edit)) if message not in known] == [], part


def message_about(unsupported: Unsupported) -> str:
    (message,) = refusals(unsupported.document)
    return message.partition(": ")[2].rstrip(".")


def test_every_unsupported_setting_has_its_advice_tried() -> None:
    reported = {message_about(each) for each in UNSUPPORTED}
    assert reported == {missing.message for missing in MISSING} | {NO_QUEUES.rstrip(".")}


@pytest.mark.parametrize("unsupported", UNSUPPORTED, ids=lambda each: message_about(each)[:40])
def test_advice_about_unsupported_settings_is_accepted(unsupported: Unsupported) -> None:
    assert untried_words(message_about(unsupported), unsupported.advice) == []
    for part, edit in unsupported.advice.items():
        assert refusals(patched(unsupported.document, edit)) == [], part


def test_advice_about_missing_storage_is_accepted() -> None:
    assert refusals(SMALLEST, CLUSTER) == [NO_STORAGE]
    assert untried_words(NO_STORAGE.rstrip("."), STORAGES) == []
    for part, edit in STORAGES.items():
        assert refusals(patched(SMALLEST, edit), CLUSTER) == [], part


def test_advice_about_missing_gangs_is_accepted() -> None:
    gang = patched(SMALLEST, {"spec.scheduling": "volcano", **STORAGES["nfs"]})
    (message,) = refusals(gang, CLUSTER)
    advice = {"auto": {"spec.scheduling": "auto"}, "none": {"spec.scheduling": "none"}}
    assert message == NO_GANGS.format(mode="volcano")
    assert untried_words(message.rstrip("."), advice) == []
    for part, edit in advice.items():
        assert refusals(patched(gang, edit), CLUSTER) == [], part
    assert refusals(gang, Settings(gangs=True)) == []


def test_advice_about_a_missing_image_for_exports_is_accepted() -> None:
    outputs = [{"format": "openvino", "to": "ov"}]
    job = patched(SMALLEST, {"spec.outputs": outputs, **STORAGES["nfs"]})
    without = replace(CLUSTER, trainer_image_export="")
    assert refusals(job, without) == [NO_EXPORT_IMAGE.format(format="openvino")]
    assert refusals(job, CLUSTER) == []
    assert refusals(patched(job, {"spec.outputs": [{"format": "diffusers", "to": "ov"}]}), without) == []


def test_advice_about_missing_racks_is_accepted() -> None:
    packed = patched(SMALLEST, {"spec.topology": {"nodes": 2, "pack": "rack"}, **STORAGES["nfs"]})
    advice = {"pack: zone": {"spec.topology.pack": "zone"}, "leave pack out": removed("spec.topology.pack")}
    assert refusals(packed, CLUSTER) == [NO_RACKS]
    assert refusals(packed, Settings(rack_label="example.com/rack")) == []
    assert untried_words(NO_RACKS.rstrip("."), advice) == []
    for part, edit in advice.items():
        assert refusals(patched(packed, edit), CLUSTER) == [], part


def test_advice_about_unserved_claims_is_accepted() -> None:
    claim = {"gpuClaimTemplateName": "gpu"}
    job = parse_job(patched(SMALLEST, {"spec.topology": claim, **STORAGES["nfs"]}))
    assert find_unsupported(job, CLUSTER, claims_served=False) == [NO_CLAIMS]
    assert find_unsupported(job, CLUSTER) == []
    without = parse_job(patched(SMALLEST, STORAGES["nfs"]))
    assert find_unsupported(without, CLUSTER, claims_served=False) == []
    advice: Advice = {"leave gpuClaimTemplateName out": {}}
    assert untried_words(NO_CLAIMS.rstrip("."), advice) == []


REPLACED = [flag for flag, replacement in FLAGS.items() if replacement.field is not None]
LEFT_OUT = [flag for flag, replacement in FLAGS.items() if replacement.field is None]


def test_every_flag_with_a_replacement_has_a_value() -> None:
    assert sorted(FLAG_VALUES) == sorted(REPLACED)


def message_about_flag(document: Document, flag: str, value: object) -> str:
    """Return the message for a manifest with a flag as a field."""
    with pytest.raises(InvalidJob) as caught:
        parse_job(patched(document, {f"spec.training.{flag}": value}))
    (problem,) = caught.value.problems
    assert problem.field == f"spec.training.{flag}"
    return problem.message.removeprefix("unknown field; ")


@pytest.mark.parametrize("flag", REPLACED)
def test_field_that_is_recommended_in_place_of_a_flag_is_accepted(flag: str) -> None:
    found = FLAG_VALUES[flag]
    replacement, document = FLAGS[flag], GOOD[found.base]
    if flag in crd.find("spec.training")["properties"]:
        return
    message = message_about_flag(document, flag, found.flag_value)
    field = replacement.field
    assert field is not None
    written = {field, field.removeprefix("spec.training.")} if replacement.write is None else {replacement.write}
    assert message.removeprefix("write ") in written
    assert refusals(patched(document, {field: found.field_value, **found.also})) == []


@pytest.mark.parametrize("flag", LEFT_OUT)
def test_flag_without_a_replacement_is_refused_with_the_reason(flag: str) -> None:
    assert message_about_flag(SMALLEST, flag, "x") == f"leave it out: {FLAGS[flag].note}"
    assert message_about_flag(SMALLEST, to_camel(flag), "x") == f"leave it out: {FLAGS[flag].note}"
    assert FLAGS[flag].note[-1] not in ".;"


def test_fields_named_in_the_remarks_about_flags_exist() -> None:
    named = {word for flag in FLAGS.values() for word in re.findall(r"spec[.][\w.]*\w", f"{flag.field} {flag.note}")}
    for path in named:
        assert crd.find(path), path


def test_unknown_field_of_a_large_part_names_the_command_that_lists_its_fields() -> None:
    (message,) = refusals(patched(SMALLEST, {"spec.training.qqqq": 1}))
    command = "kubectl explain finetunejob.spec.training"
    assert message == f"spec.training.qqqq: unknown field; to list the fields here: {command}"
    (message,) = refusals(patched(SMALLEST, {"spec.model.qqqq": 1}))
    assert message == "spec.model.qqqq: unknown field; the fields here are base, revision, variant, config, vae, image"


@pytest.mark.parametrize("path", CHANGES)
def test_forbidden_edit_is_accepted_in_a_new_job_with_another_name(path: str) -> None:
    (fixed,) = (fixed for fixed in edits.FIXED if fixed.path == path)
    assert fixed.message.endswith("; write the change into a new job with another name")
    new = patched(FULL, CHANGES[path] | {"metadata.name": "circles-2"})
    assert [message for message in refusals(new) if message not in refusals(FULL)] == []


@pytest.mark.parametrize(
    ("wrong", "message", "right"),
    [
        (
            {"nodeSelector": {"zone": "a"}},
            "nodeSelector is not a field of a PodTemplateSpec; write it below spec or metadata",
            {"spec": {"nodeSelector": {"zone": "a"}}},
        ),
        (
            {"labels": {"team": "a"}},
            "labels is not a field of a PodTemplateSpec; write it below spec or metadata",
            {"metadata": {"labels": {"team": "a"}}},
        ),
        (
            {"spec": {"$patch": "replace", "containers": [{"name": "mine"}]}},
            "it removes the container trainer; keep the container and write only the fields to change",
            {"spec": {"containers": [{"name": "trainer", "image": "mine"}]}},
        ),
        (
            {"spec": {"containers": [{"image": "mine"}]}},
            "an item of containers has no name, which is needed to merge it; write name",
            {"spec": {"containers": [{"name": "trainer", "image": "mine"}]}},
        ),
    ],
)
def test_advice_about_pod_templates_is_accepted(wrong: Document, message: str, right: Document) -> None:
    with pytest.raises(MergeError) as caught:
        build_pod(parse_job(patched(SMALLEST, {"spec.podTemplate": wrong})), 1, 0, LOCAL)
    assert str(caught.value) == message
    assert build_pod(parse_job(patched(SMALLEST, {"spec.podTemplate": right})), 1, 0, LOCAL)


def test_examples_of_durations_and_quantities_are_parsed() -> None:
    for parse in (duration.parse_seconds, parse_quantity):
        with pytest.raises(ValueError, match="write") as caught:
            parse("soon")
        examples = re.split(r", | or ", str(caught.value).partition("write e.g. ")[2])
        assert len(examples) == 3
        for example in examples:
            assert parse(example) > 0


def test_values_that_no_method_supports_are_not_recommended() -> None:
    for value in messages.UNWRITTEN_VALUES["spec.outputs[].format"]:
        document = patched(SMALLEST, {"spec.outputs": [{"format": value.upper(), "to": "out"}]})
        (message,) = refusals(document)
        assert not message.endswith(f"; write {value}")
