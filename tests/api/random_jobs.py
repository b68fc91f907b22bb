"""Random manifests for hypothesis: each field alone is valid, combinations may break any rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hypothesis import strategies as st

from finetune_operator.api import crd
from finetune_operator.api.validate import InvalidJob, parse_job
from tests.api.manifests import GOOD, Document, patched

Schema = Mapping[str, Any]
Change = tuple[str, Any]

NAMES = st.sampled_from(["a", "circles", "hub-token", "a.b", "Not_A_Name", "-", "x" * 60])
MANAGERS = st.sampled_from(["a/b", "kueue.x-k8s.io/multikueue", "a", "a/", "/b", "A/b", "a.b/C_d", "a/b/c"])
DURATIONS = st.sampled_from(["90s", "10m", "1h30m", "0s", "", "10 minutes", "1.5h", "30m1h"])
LOCATIONS = st.sampled_from(["out", "/out", "s3://b/x", "s3://", "hub://a/b", "hub://a", "ftp://x/y", "https://x.y/z"])
PATHS = st.sampled_from(["/a", "/a/b", "a", "", "/a/../b", "/..", "/a..b", "../a"])
RESOURCES = st.dictionaries(
    st.sampled_from(["cpu", "memory", "nvidia.com/gpu", "hugepages-2Mi", "memroy", "/", "a/b"]),
    st.sampled_from([1, 2, 0, -1, "1", "2", "500m", "32Gi", "32GB", "1.5", ".5", "1e3", "1E", "", "-1", "+1", "1 "]),
    max_size=4,
)
# Fields whose form only a rule checks: random values would almost never be valid.
SPECIAL: dict[str, st.SearchStrategy[Any]] = {
    "spec.queueName": NAMES,
    "spec.priorityClassName": NAMES,
    "spec.secrets[].name": NAMES,
    "spec.checkpoint.storage.persistentVolumeClaim.claimName": NAMES,
    "spec.managedBy": MANAGERS,
    "spec.recovery.hangTimeout": DURATIONS,
    "spec.recovery.spot.fallbackAfter": DURATIONS,
    "spec.recovery.shrinkAfter": DURATIONS,
    "spec.outputs[].to": LOCATIONS,
    "spec.model.base": LOCATIONS | st.sampled_from(["/finetune/model", "/finetune/model/a/", "/finetune/model/../a"]),
    "spec.model.image.reference": st.sampled_from(["a.b:5000/c/d:1.0", "sdxl", "a/b@sha256:12", "https://a/b", "a b"]),
    "spec.topology.gpuClaimTemplateName": NAMES,
    "spec.recovery.maxMemory": st.sampled_from(["1", "64Gi", "64GB"]),
    "spec.dataset.source": LOCATIONS,
    "spec.dataset.additional[].source": LOCATIONS,
    "spec.training.dreambooth.classImages": LOCATIONS,
    "spec.checkpoint.storage.hostPath.path": PATHS.filter(bool),
    "spec.checkpoint.storage.nfs.path": PATHS.filter(bool),
    "spec.checkpoint.scratch.sizeLimit": st.sampled_from(["50Gi", "50GB", "1e3", "many"]),
    "spec.checkpoint.storage.bucket.url": st.sampled_from(["s3://models/a", "gs://models", "az://models/", "s3://M"]),
    "spec.checkpoint.storage.bucket.endpoint": st.sampled_from(["https://s3.example.com", "http://a:9000/", "a:9"]),
    "spec.training.memoryPreset": st.sampled_from(["auto", "cpu", "16GB", "16 GB", "0GB", "12345GB"]),
    "spec.training.validation.split": st.sampled_from(["train", "validation"]),
    "spec.dataset.columns.image": st.sampled_from(["image", "text", "edges"]),
    "spec.dataset.streaming": st.booleans(),
    "spec.training.centerCrop": st.booleans(),
    "spec.dataset.columns.caption": st.sampled_from(["image", "text", "edges"]),
    "spec.dataset.columns.conditioning": st.sampled_from(["image", "text", "edges"]),
    "spec.training.textualInversion.placeholderToken": st.sampled_from(["<cat>", "toy", "a b", "a\tb"]),
    "spec.training.textualInversion.initializerToken": st.sampled_from(["toy", "<cat>"]),
    "spec.checkpoint.from.job": st.sampled_from(["circles", "my circles"]),
    "spec.checkpoint.from.url": st.sampled_from(["s3://models/a", "https://a/b"]),
    "spec.topology.resources": RESOURCES,
    "spec.training.script.args": st.sampled_from([{"max_train_steps": 5}, ["--seed", "1"]]),
    "spec.training.script.env": st.just({"HF_HUB_OFFLINE": "1"}),
    "spec.training.script.accelerateConfig": st.just({"mixed_precision": "bf16"}),
    "spec.training.script.configMap.name": NAMES,
    "spec.podTemplate": st.just({"spec": {"nodeSelector": {"zone": "a"}}}),
}
MAX_TEXT = 12


def values(path: str, schema: Schema) -> st.SearchStrategy[Any]:
    """Return values that match a field's schema."""
    if path in SPECIAL:
        return SPECIAL[path]
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if schema["type"] == "array":
        return st.lists(values(f"{path}[]", schema["items"]), min_size=schema.get("minItems", 0), max_size=3)
    if schema["type"] == "object":
        return _objects(path, schema)
    return _scalars(schema)


def _objects(path: str, schema: Schema) -> st.SearchStrategy[Any]:
    fields = {name: values(f"{path}.{name}", field) for name, field in schema["properties"].items()}
    required = schema.get("required", ())
    return st.fixed_dictionaries(
        {name: value for name, value in fields.items() if name in required},
        optional={name: value for name, value in fields.items() if name not in required},
    )


def _scalars(schema: Schema) -> st.SearchStrategy[Any]:
    match schema["type"]:
        case "boolean":
            return st.booleans()
        case "string":
            # No characters that JSON or YAML must escape: their escaping is not under test.
            text = st.characters(categories=("L", "N", "P"))
            most = min(MAX_TEXT, schema.get("maxLength", MAX_TEXT))
            return st.text(text, min_size=schema.get("minLength", 0), max_size=most)
        case "integer":
            factor = schema.get("multipleOf", 1)
            low, high = schema["minimum"] // factor, schema["maximum"] // factor
            # Small numbers reach the bounds between fields.
            small = st.integers(low, min(low + 5, high))
            return (small | st.integers(low, high)).map(lambda number: number * factor)
        case _:
            return st.floats(
                schema["minimum"],
                schema.get("maximum", 1000),
                exclude_min=schema.get("exclusiveMinimum", False),
                exclude_max=schema.get("exclusiveMaximum", False),
                allow_subnormal=False,
            )


def _leaves(path: str, schema: Schema) -> Iterator[tuple[str, Schema]]:
    """Yield the fields to change one by one; the fields of an optional part are changed together: some are required."""
    for name, field in schema["properties"].items():
        below = f"{path}.{name}"
        if "properties" in field and not field.get("required"):
            yield from _leaves(below, field)
        else:
            yield below, field


def _changes() -> st.SearchStrategy[Change]:
    leaves = [leaf for leaf in _leaves("spec", crd.find("spec")) if leaf[0] not in ("spec.model", "spec.dataset")]
    for part in ("spec.model", "spec.dataset"):
        leaves += _leaves(part, crd.find(part))
    given = [st.tuples(st.just(path), values(path, schema)) for path, schema in leaves]
    # Null removes a field, e.g. the settings of a method.
    optional = [path for path, _ in leaves if path not in ("spec.model.base", "spec.dataset.source")]
    taken = st.tuples(st.sampled_from(["spec.training.method", "spec.training.steps", *optional]), st.none())
    return st.one_of(*given, *[taken] * 4)


CHANGES = st.lists(_changes(), max_size=12)
BASES = st.sampled_from([base for name, base in GOOD.items() if name not in ("longest-name", "nulls")])


@st.composite
def documents(draw: st.DrawFn) -> Document:
    """Return manifests in which every field by itself is valid."""
    return patched(draw(BASES), dict(draw(CHANGES)))


@st.composite
def valid_documents(draw: st.DrawFn) -> Document:
    """Return valid manifests."""
    return _valid(draw(BASES), draw(CHANGES))


@st.composite
def valid_edits(draw: st.DrawFn) -> tuple[Document, Document]:
    """Return two valid manifests of a job, the second one a small edit of the first."""
    document: Document = draw(valid_documents())
    return document, _valid(document, draw(st.lists(_changes(), max_size=3)))


def _valid(document: Document, changes: list[Change]) -> Document:
    """Return a manifest with those changes that keep it valid."""
    for change in changes:
        changed = patched(document, dict([change]))
        try:
            parse_job(changed)
        except InvalidJob:
            continue
        document = changed
    return document
