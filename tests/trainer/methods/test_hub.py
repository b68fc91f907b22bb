"""Models on the hub: which files are downloaded, after which errors, and which caches can be used offline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils._paths import filter_repo_objects
from safetensors.torch import save_file
from transformers import CLIPTextModel

from finetune_contract.identity import InputIdentity
from finetune_contract.input_spec import ModelSpec
from finetune_contract.methods import needs_whole_base
from finetune_contract.outputs.spec import OutputSpec
from finetune_contract.spec import Method
from finetune_trainer import patience
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import ConfigError, NetworkError
from finetune_trainer.methods import embedding_file
from finetune_trainer.methods.embedding_file import find_embedding_files, read_embeddings
from finetune_trainer.models import hub as models_hub
from finetune_trainer.models.base import find_part, open_base
from finetune_trainer.models.hub import ANY_WEIGHTS, EMBEDDINGS, ONE_PART, HubFiles
from finetune_trainer.report import Reporter
from finetune_trainer.train.input_record import InputRecord
from finetune_trainer.train.inputs import _fetch_parts
from finetune_trainer.train.pin_store import PinStore
from testing import hub
from testing.hub import HubServer
from testing.trainer import tiny
from testing.trainer.methods import write_pipeline
from testing.trainer.single_file import to_original

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)
WHOLE = {
    "safety_checker/config.json": "{}",
    "safety_checker/model.safetensors": "weights",
    "safety_checker/model.fp16.safetensors": "weights",
    "v1-5-pruned.safetensors": "weights",
    "v1-5-pruned-emaonly.safetensors": "weights",
    "unet/diffusion_pytorch_model.non_ema.safetensors": "weights",
    "unet/diffusion_pytorch_model.bin": "pickle",
    "README.md": "text",
}
"""Further files, as published bases have them."""
PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
DEFAULT_WEIGHTS = {f"{part}/{name}.safetensors" for part, name in PARTS.items()}
FP16_WEIGHTS = {f"{part}/{name}.fp16.safetensors" for part, name in PARTS.items()}


@pytest.fixture(name="published", scope="module")
def _published(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a base with the files of a published one: eleven weight files, of which three are needed."""
    folder = shutil.copytree(base, tmp_path_factory.mktemp("published") / "base")
    for default, half in zip(sorted(DEFAULT_WEIGHTS), sorted(FP16_WEIGHTS), strict=True):
        shutil.copyfile(folder / default, folder / half)
    for name, text in WHOLE.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    assert len(list(folder.rglob("*.safetensors"))) == 11
    return folder


@pytest.fixture(name="server", scope="module")
def _server(published: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with hub.serve(tmp_path_factory.mktemp("hub")) as server:
        server.publish("models", "me/base", published)
        server.publish("models", "me/vae", base / "vae")
        yield server


@pytest.fixture(autouse=True)
def _client(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this process use the stand-in, with an empty cache and without pauses."""
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    quick = patience.Patience(limit_seconds=lambda: 100, clock=lambda: 0.0, pause=lambda _: False)
    monkeypatch.setattr(patience, "_PROCESS", quick)
    models_hub.limit_waits()
    yield
    server.recover()
    if not server.is_up:
        server.start()
    huggingface_hub.close_session()


def shorten_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    models_hub.limit_waits()


def files_of(folder: Path, suffix: str = ".safetensors") -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob(f"*{suffix}")}


def fetch(files: HubFiles, name: str = "me/base", revision: str | None = None) -> Path:
    return models_hub.fetch(name, revision, "model.base", files)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (HubFiles.of_base(None, own_vae=True, whole=False), DEFAULT_WEIGHTS),
        (HubFiles.of_base("fp16", own_vae=True, whole=False), FP16_WEIGHTS),
        (HubFiles.of_base(None, own_vae=True, whole=True), {*DEFAULT_WEIGHTS, "safety_checker/model.safetensors"}),
        (HubFiles.of_base("fp16", own_vae=True, whole=True), {*FP16_WEIGHTS, "safety_checker/model.fp16.safetensors"}),
        (
            HubFiles.of_base(None, own_vae=False, whole=False),
            {name for name in DEFAULT_WEIGHTS if not name.startswith("vae/")},
        ),
    ],
)
def test_only_the_weights_that_are_read_are_downloaded(files: HubFiles, expected: set[str]) -> None:
    folder = fetch(files)
    assert files_of(folder) == expected
    assert files_of(folder, ".bin") == set()
    assert (folder / "tokenizer" / "vocab.json").is_file()


@pytest.mark.parametrize(
    ("method", "output", "is_whole"),
    [
        (Method.LORA, {"format": "kohya"}, False),
        (Method.LORA, {"format": "merged"}, True),
        (Method.LORA, {"format": "diffusers", "full": True}, True),
        (Method.FULL, {"format": "diffusers"}, True),
        (None, {"format": "asWritten"}, False),
        (None, {"format": "merged"}, True),
    ],
)
def test_only_outputs_with_a_pipeline_need_all_parts(
    method: Method | None, output: dict[str, Any], is_whole: bool
) -> None:
    assert needs_whole_base(method, [OutputSpec.model_validate({**output, "to": "x"})]) is is_whole


def test_a_sharded_part_is_downloaded_completely() -> None:
    names = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    half = [name.replace("model-", "model.fp16-") for name in names]
    late = [name.replace(".safetensors", ".fp16.safetensors") for name in names]
    found = list(filter_repo_objects([*names, *half, *late], allow_patterns=HubFiles().allowed))
    assert found == names
    allowed = HubFiles("fp16").allowed
    assert [*filter_repo_objects([*names, *half], allow_patterns=allowed)] == half
    assert set(late) <= {*filter_repo_objects(late, allow_patterns=allowed)}


@pytest.mark.parametrize("fault", [hub.TOO_MANY_REQUESTS, hub.UNAVAILABLE, hub.RESET, hub.STALL])
@pytest.mark.parametrize("only", ["/api/models", "/resolve/"])
def test_transient_errors_are_waited_out(
    server: HubServer, fault: hub.Fault, only: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault is hub.STALL:
        shorten_timeouts(monkeypatch)
    server.fail_next(fault, only=only)
    assert files_of(fetch(HubFiles.of_base(None, own_vae=True, whole=False))) == DEFAULT_WEIGHTS


def test_refused_connections_are_waited_out(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.stop()

    def restart(_: float) -> bool:
        server.start()
        return False

    restarts = patience.Patience(limit_seconds=lambda: 100, clock=lambda: 0.0, pause=restart)
    monkeypatch.setattr(patience, "_PROCESS", restarts)
    assert files_of(fetch(HubFiles())) >= DEFAULT_WEIGHTS


def test_an_outage_that_lasts_is_a_network_error(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.fail_always(hub.UNAVAILABLE, only="/api/models")
    monkeypatch.setattr(patience, "_PROCESS", patience.Patience(limit_seconds=lambda: 0))
    with pytest.raises(NetworkError, match=r"model\.base: fetching me/base from the hub failed: .*503"):
        fetch(HubFiles())


@pytest.mark.parametrize(("name", "revision"), [("me/none", None), ("me/base", "v9"), ("not a name", None)])
def test_permanent_errors_are_final_at_once(server: HubServer, name: str, revision: str | None) -> None:
    before = server.count()
    with pytest.raises(ConfigError, match=r"model\.base: cannot fetch"):
        fetch(HubFiles(), name, revision)
    assert server.count() - before <= 2


def test_a_known_commit_takes_no_request(server: HubServer) -> None:
    files = HubFiles.of_base(None, own_vae=True, whole=False)
    folder = fetch(files)
    before = server.count("/base/")
    assert fetch(files, revision=folder.name) == folder
    assert server.count("/base/") == before


def test_a_cache_that_another_program_filled_is_used_offline(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers downloads the parts of the pipeline, and no other configurations."""
    patterns = ["model_index.json", *(f"{part}/*" for part in (*PARTS, "scheduler", "tokenizer"))]
    snapshot_download("me/base", allow_patterns=patterns, ignore_patterns=["*.fp16.*", "*.non_ema.*", "*.bin"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    family = open_base(ModelSpec(base="me/base"))
    assert family.load_denoiser(torch.float32) is not None
    with pytest.raises(ConfigError, match="cannot fetch me/base"):
        open_base(ModelSpec(base="me/base", variant="fp16"))
    assert published.is_dir()


def test_a_vae_without_the_variant_of_the_base_is_read(base: Path, published: Path, tmp_path: Path) -> None:
    family = open_base(ModelSpec(base="me/base", vae="me/vae", variant="fp16"))
    assert family.load_image_encoder(CPU) is not None
    assert [path.name for path in family.image_encoder_files()] == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    written = write_pipeline(family, tmp_path / "written")
    assert tmp_path / "written" / "vae" / "diffusion_pytorch_model.safetensors" in written
    local = open_base(ModelSpec(base=str(published), vae=str(base / "vae"), variant="fp16"))
    assert local.load_image_encoder(CPU) is not None


@pytest.mark.parametrize("variant_is_last", [False, True])
def test_numbered_files_of_a_variant_are_written_with_default_names(
    base: Path, tmp_path: Path, variant_is_last: bool
) -> None:
    """Newer releases of diffusers write the variant before the number, older ones behind it."""
    source = shutil.copytree(base, tmp_path / "base")
    for part, model in (("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel)):
        model.from_pretrained(base / part).save_pretrained(source / part, variant="fp16", max_shard_size="60KB")
        for path in (source / part).glob("*.safetensors.index.fp16.json"):
            numbers = sorted((source / part).glob("*.fp16-*"))
            assert len(numbers) > 1
            if variant_is_last:
                text = path.read_text(encoding="utf-8")
                for each in numbers:
                    name = each.name.replace(".fp16-", "-").replace(".safetensors", ".fp16.safetensors")
                    text = text.replace(each.name, name)
                    each.rename(each.with_name(name))
                path.write_text(text, encoding="utf-8")
    family = open_base(ModelSpec(base=str(source), variant="fp16"))
    assert sum("-of-" in path.name for path in family.denoiser_files()) > 1
    written = write_pipeline(family, tmp_path / "written")
    assert not [path for path in written if "fp16" in path.name]
    for part, model in (("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel)):
        found = model.from_pretrained(tmp_path / "written" / part, use_safetensors=True).state_dict()
        for name, value in model.from_pretrained(base / part).state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_a_vae_that_cannot_be_read_is_named(base: Path, tmp_path: Path) -> None:
    vae = shutil.copytree(base / "vae", tmp_path / "vae")
    (vae / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    family = open_base(ModelSpec(base=str(base), vae=str(vae)))
    with pytest.raises(ConfigError, match=r"^model\.vae: the VAE of .* cannot be read"):
        family.load_image_encoder(CPU)


def test_parts_and_adapters_are_downloaded_without_other_files(server: HubServer, tmp_path: Path) -> None:
    for name in ("config.json", "diffusion_pytorch_model.safetensors", "sdxl_vae.safetensors", "a/model.safetensors"):
        (tmp_path / "part" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "part" / name).write_text(json.dumps({}), encoding="utf-8")
    server.publish("models", "me/part", tmp_path / "part")
    assert files_of(find_part("me/part", None, "model.vae", ONE_PART)) == {"diffusion_pytorch_model.safetensors"}
    adapters = files_of(find_part("me/part", None, "training.lora.base", ANY_WEIGHTS))
    assert "sdxl_vae.safetensors" in adapters


def test_an_embedding_that_is_published_as_a_pickle_is_read(server: HubServer, tmp_path: Path) -> None:
    vectors, folder = torch.ones(2, tiny.WIDTH), tmp_path / "token"
    for name in ("learned_embeds.bin", "logs/optimizer.bin"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"<token>": vectors}, folder / name)
    server.publish("models", "me/token", folder)
    found = find_part("me/token", None, embedding_file.FIELD, EMBEDDINGS)
    assert files_of(found, ".bin") == {"learned_embeds.bin"}
    (file,) = find_embedding_files(found)
    assert torch.equal(read_embeddings(file)["<token>"], vectors)
    # It is still no way to run code.
    torch.save({"<token>": vectors, "more": Path()}, folder / "learned_embeds.bin")
    server.publish("models", "me/token", folder)
    (file,) = find_embedding_files(find_part("me/token", None, embedding_file.FIELD, EMBEDDINGS))
    with pytest.raises(ConfigError, match="contains more than weights"):
        read_embeddings(file)


def test_the_configuration_of_a_single_file_is_pinned_to_a_commit(
    server: HubServer, published: Path, base: Path, tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    save_file(to_original(StableDiffusionPipeline.from_pretrained(base, safety_checker=None)), file)
    spec = tiny.make_spec(base, Path("unused"))
    spec = spec.model_copy(update={"model": ModelSpec(base=str(file), config="me/config")})
    commit = server.publish("models", "me/config", published)

    def attempt() -> ModelSpec:
        record = InputRecord.open("tiny", ALONE, PinStore(tmp_path / "job", None), Reporter(0, None))
        found = _fetch_parts(spec, spec, ALONE, record).model
        assert record.identities == (InputIdentity(field="model.config", location="me/config", commit=commit),)
        return found

    first = attempt()
    folder = Path(first.config or "")
    assert files_of(folder) == set()
    assert open_base(first, tmp_path / "converted").load_denoiser(torch.float32) is not None
    other = shutil.copytree(published, tmp_path / "other")
    (other / "scheduler" / "scheduler_config.json").write_text("{}", encoding="utf-8")
    assert server.publish("models", "me/config", other) != commit
    assert attempt() == first


def test_an_edited_configuration_of_a_single_file_is_converted_again(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(to_original(StableDiffusionPipeline.from_pretrained(base, safety_checker=None)), file)
    config = shutil.copytree(base, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    model = ModelSpec(base=str(file), config=str(config))
    schedule = config / "scheduler" / "scheduler_config.json"
    before = open_base(model, tmp_path / "converted").denoiser_files()
    schedule.write_text(schedule.read_text("utf-8").replace('"epsilon"', '"v_prediction"'), encoding="utf-8")
    assert open_base(model, tmp_path / "converted").denoiser_files() != before


def test_a_silent_hub_does_not_stop_a_request_for_ever(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_timeouts(monkeypatch)
    server.fail_next(hub.STALL, only="/api/models")
    with pytest.raises(Exception, match="timed out"):
        huggingface_hub.HfApi().model_info("me/base")
