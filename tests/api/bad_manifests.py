"""Invalid manifests: one for each kind of problem, with its message. Checked with `parse_job` and the API server."""

from __future__ import annotations

from finetune_operator.api.job import API_VERSION
from tests.api.bad_combinations import BAD_COMBINATIONS
from tests.api.bad_manifest import BadManifest
from tests.api.bad_pods import BAD_PODS
from tests.api.bad_scripts import BAD_SCRIPTS
from tests.api.bad_weights import BAD_WEIGHTS
from tests.api.manifests import REMOVED

BAD_VALUES = (
    # The kind of the object.
    BadManifest("other-kind", {"kind": "Job"}, "kind", "write kind: FineTuneJob", reaches_schema=False),
    BadManifest("no-kind", {"kind": REMOVED}, "kind", "write kind: FineTuneJob", reaches_schema=False),
    BadManifest(
        "other-version", {"apiVersion": "v1"}, "apiVersion", f"write apiVersion: {API_VERSION}", reaches_schema=False
    ),
    BadManifest(
        "no-name", {"metadata.name": REMOVED}, "metadata.name", "Required value; write name", reaches_schema=False
    ),
    BadManifest(
        "no-metadata", {"metadata": REMOVED}, "metadata", "Required value; write metadata", reaches_schema=False
    ),
    BadManifest(
        "namespace-is-a-path", {"metadata.namespace": "../x"}, "metadata.namespace", "match", reaches_schema=False
    ),
    BadManifest("name-in-capitals", {"metadata.name": "Circles_1"}, "metadata.name", "lower-case letters"),
    BadManifest("name-with-dot", {"metadata.name": "circles.v1"}, "metadata.name", "lower-case letters"),
    BadManifest("name-begins-with-digit", {"metadata.name": "1circle"}, "metadata.name", "a letter first"),
    BadManifest("name-too-long", {"metadata.name": "c" * 52}, "metadata.name", "write a name of at most 51"),
    # Missing, unknown or misplaced fields.
    BadManifest("no-spec", {"spec": REMOVED}, "spec", "Required value; write spec"),
    BadManifest("no-model", {"spec.model": REMOVED}, "spec.model", "Required value; write model"),
    BadManifest("no-dataset", {"spec.dataset": None}, "spec.dataset", "Required value; write dataset"),
    BadManifest(
        "no-output-place", {"spec.outputs": [{"format": "webui"}]}, "spec.outputs[0].to", "Required value; write to"
    ),
    BadManifest("misspelt", {"spec.training.learningrate": 1}, "spec.training.learningrate", "write learningRate"),
    BadManifest("snake-case", {"spec.training.batch_size": 2}, "spec.training.batch_size", "write batchSize"),
    BadManifest(
        "flag-of-a-script",
        {"spec.training.max_train_steps": 2},
        "spec.training.max_train_steps",
        "write spec.training.steps",
    ),
    BadManifest(
        "misplaced", {"spec.processesPerNode": 2}, "spec.processesPerNode", "write spec.topology.processesPerNode"
    ),
    BadManifest(
        "invented",
        {"spec.model.flavour": "x"},
        "spec.model.flavour",
        "the fields here are base, revision, variant, config, vae, image",
    ),
    BadManifest(
        "invented-at-top", {"template": {}}, "template", "the fields here are apiVersion, kind, metadata, spec, status"
    ),
    # Values of a wrong type.
    BadManifest("quoted-number", {"spec.training.steps": "200"}, "spec.training.steps", "write 200 without quotes"),
    BadManifest("text-for-number", {"spec.training.steps": "many"}, "spec.training.steps", "must be of type integer"),
    BadManifest("text-for-rate", {"spec.training.learningRate": "low"}, "spec.training.learningRate", "e.g. 0.0001"),
    BadManifest("fraction", {"spec.training.steps": 2.5}, "spec.training.steps", "must be of type integer"),
    BadManifest(
        "quoted-rate", {"spec.training.learningRate": "0.0001"}, "spec.training.learningRate", "write 0.0001 without"
    ),
    BadManifest(
        "rate-of-yaml-1.1",
        {"spec.training.learningRate": "1e-4"},
        "spec.training.learningRate",
        "(YAML 1.1 reads a number without a decimal point as text); write 1.0e-4",
    ),
    BadManifest("quoted-bool", {"spec.training.ema": "yes"}, "spec.training.ema", "write true without quotes"),
    BadManifest("number-for-bool", {"spec.suspend": 1}, "spec.suspend", "write true or false"),
    BadManifest("number-for-text", {"spec.model.revision": 7}, "spec.model.revision", "write a string"),
    BadManifest("text-for-fields", {"spec.model": "sd15"}, "spec.model", "must be of type object"),
    BadManifest("text-for-list", {"spec.outputs": "webui"}, "spec.outputs", "must be of type array"),
    BadManifest("nothing-in-list", {"spec.outputs": [None]}, "spec.outputs[0]", "must be of type object"),
    BadManifest(
        "fraction-of-cpu", {"spec.topology.resources": {"cpu": 0.5}}, "spec.topology.resources.cpu", "e.g. 8, 500m"
    ),
    # Values that are out of bounds.
    BadManifest("method-in-lower-case", {"spec.training.method": "lora"}, "spec.training.method", "write LoRA"),
    BadManifest(
        "unknown-method", {"spec.training.method": "Hypernetwork"}, "spec.training.method", 'values: "LoRA", "Dream'
    ),
    BadManifest("unknown-optimizer", {"spec.training.optimizer": "AdamW"}, "spec.training.optimizer", "write adamw"),
    BadManifest(
        "unknown-format", {"spec.outputs": [{"format": "ckpt", "to": "o"}]}, "spec.outputs[0].format", "Unsupported"
    ),
    BadManifest(
        "batch-of-zero", {"spec.training.batchSize": 0}, "spec.training.batchSize", "greater than or equal to 1"
    ),
    BadManifest("no-nodes", {"spec.topology.nodes": 0}, "spec.topology.nodes", "should be greater than or equal to 1"),
    BadManifest(
        "negative-steps", {"spec.training.steps": -1}, "spec.training.steps", "should be greater than or equal to 1"
    ),
    BadManifest(
        "rate-of-zero", {"spec.training.learningRate": 0}, "spec.training.learningRate", "should be greater than 0"
    ),
    BadManifest(
        "rate-without-minus", {"spec.training.learningRate": 1e4}, "spec.training.learningRate", "or equal to 10"
    ),
    BadManifest("beta-of-one", {"spec.training.adamBeta1": 1}, "spec.training.adamBeta1", "should be less than 1"),
    BadManifest("resolution", {"spec.training.resolution": 500}, "spec.training.resolution", "write 496 or 504"),
    BadManifest("empty-base", {"spec.model.base": ""}, "spec.model.base", "should be at least 1 chars long"),
    BadManifest("long-base", {"spec.model.base": "x" * 1025}, "spec.model.base", "may not be more than 1024"),
    BadManifest(
        "no-modules", {"spec.training.lora.targetModules": []}, "spec.training.lora.targetModules", "at least 1 items"
    ),
    BadManifest(
        "too-many-outputs",
        {"spec.outputs": [{"format": "webui", "to": str(number)} for number in range(9)]},
        "spec.outputs",
        "must have at most 8 items",
    ),
    # Rules about one string.
    BadManifest("queue-name", {"spec.queueName": "My Queue"}, "spec.queueName", "leave queueName out"),
    BadManifest("manager", {"spec.managedBy": "kueue"}, "spec.managedBy", "write its domain and name"),
    BadManifest("priority-class", {"spec.priorityClassName": "High_"}, "spec.priorityClassName", "lower-case letters"),
    BadManifest(
        "output-secret-name",
        {"spec.outputs": [{"format": "webui", "to": "s3://m/x", "secret": {"name": "HF_TOKEN"}}]},
        "spec.outputs[0].secret.name",
        "lower-case letters",
    ),
    BadManifest("secret-name", {"spec.secrets": [{"name": "HF_TOKEN"}]}, "spec.secrets[0].name", "lower-case letters"),
    BadManifest(
        "claim-name",
        {"spec.checkpoint.storage.persistentVolumeClaim": {"claimName": "/mnt"}},
        "spec.checkpoint.storage.persistentVolumeClaim.claimName",
        "lower-case letters",
    ),
    BadManifest(
        "base-is-a-page", {"spec.model.base": "https://example.com/a/b"}, "spec.model.base", "write its hub id"
    ),
    BadManifest(
        "data-set-is-a-page", {"spec.dataset.source": "http://example.com/a"}, "spec.dataset.source", "write its hub id"
    ),
    BadManifest("preset", {"spec.training.memoryPreset": "16 GB"}, "spec.training.memoryPreset", "write auto, cpu or"),
    BadManifest(
        "duration", {"spec.recovery.hangTimeout": "10 minutes"}, "spec.recovery.hangTimeout", "e.g. 90s, 10m or 1h30m"
    ),
    BadManifest("no-time", {"spec.recovery.hangTimeout": "0s"}, "spec.recovery.hangTimeout", "e.g. 90s, 10m or 1h30m"),
    BadManifest("stale", {"spec.checkpoint.maxStale": "never"}, "spec.checkpoint.maxStale", "e.g. 90s, 10m or 1h30m"),
    BadManifest(
        "best-of-nothing",
        {"spec.checkpoint.keepBest": True},
        "spec.checkpoint.keepBest",
        "write training.validation.split",
    ),
    BadManifest("shrink-no-unit", {"spec.recovery.shrinkAfter": "30"}, "spec.recovery.shrinkAfter", "write e.g. 90s"),
    BadManifest(
        "no-unit", {"spec.recovery.spot.fallbackAfter": "30"}, "spec.recovery.spot.fallbackAfter", "write e.g. 90s"
    ),
    BadManifest(
        "relative-path",
        {"spec.checkpoint.storage.hostPath": {"path": "checkpoints"}},
        "spec.checkpoint.storage.hostPath.path",
        "write it from the root",
    ),
    BadManifest(
        "path-upwards",
        {"spec.checkpoint.storage.nfs": {"server": "nfs", "path": "/exports/.."}},
        "spec.checkpoint.storage.nfs.path",
        "without '..'",
    ),
    BadManifest(
        "outputs-overwrite-spelled-otherwise",
        {"spec.outputs": [{"format": "merged", "to": "./out"}, {"format": "diffusers", "to": "out/"}]},
        "spec.outputs",
        "write a different to for each",
    ),
    BadManifest(
        "unknown-scheme",
        {"spec.outputs": [{"format": "webui", "to": "ftp://host/x"}]},
        "spec.outputs[0].to",
        "write a folder",
    ),
    BadManifest(
        "hub-without-owner",
        {"spec.outputs": [{"format": "webui", "to": "hub://x"}]},
        "spec.outputs[0].to",
        "write a folder",
    ),
    BadManifest(
        "secret-of-a-folder",
        {"spec.outputs": [{"format": "webui", "to": "out", "secret": {"name": "a"}}]},
        "spec.outputs[0].secret",
        "leave secret out",
    ),
    BadManifest(
        "two-words-for-a-token",
        {"spec.training.textualInversion.placeholderToken": "cat toy"},
        "spec.training.textualInversion.placeholderToken",
        "write one token",
        base="textual-inversion",
    ),
)

BAD = (*BAD_VALUES, *BAD_COMBINATIONS, *BAD_SCRIPTS, *BAD_WEIGHTS, *BAD_PODS)
"""All invalid manifests."""
