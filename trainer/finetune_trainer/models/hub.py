"""Models on the hub: downloads the files that training reads into HF_HOME, or finds them there.

An outage of the hub is waited out (see `patience`); the hub's library resumes the download.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer import patience
from finetune_trainer.errors import ConfigError

_CONFIGURATIONS = ("*.json", "*.txt", "*.model")
_WEIGHTS = ("diffusion_pytorch_model", "model")
"""Names of the files of weights that diffusers and transformers read; never pickles."""
_ONLY_OF_PIPELINES = ("safety_checker", "image_encoder")
"""Parts of a base that only the copies in a written pipeline contain."""


@dataclass(frozen=True)
class HubFiles:
    """The files of a repository that are needed.

    Attributes:
        variant: weight variant; None for the default weights.
        is_part: whether the repository is one part (a VAE, a ControlNet), without folders.
        without: folders whose weights are not needed.
        any_name: whether the weights have no fixed names: adapters, embeddings.
        pickles: suffixes of pickles, outside of folders, that are read as weights only.
        without_weights: whether only the configurations are needed.
    """

    variant: str | None = None
    is_part: bool = False
    without: Sequence[str] = ()
    any_name: bool = False
    pickles: Sequence[str] = ()
    without_weights: bool = False

    @classmethod
    def of_base(cls, variant: str | None, *, own_vae: bool, whole: bool) -> HubFiles:
        """Return the files of a base.

        Args:
            variant: weight variant; None for the default weights.
            own_vae: whether the VAE of the base is used.
            whole: whether a pipeline is written, which contains copies of all parts.
        """
        without = () if whole else _ONLY_OF_PIPELINES
        return cls(variant, without=without if own_vae else (*without, "vae"))

    @property
    def allowed(self) -> list[str]:
        """Patterns of the names of the files."""
        variant = f".{self.variant}" if self.variant else ""
        if self.without_weights:
            return [*_CONFIGURATIONS]
        if self.any_name:
            return [*_CONFIGURATIONS, "*.safetensors", *(f"*{suffix}" for suffix in self.pickles)]
        # diffusers and transformers write the variant of a file of many before or after its number.
        endings = {variant, f"{variant}-*-of-?????", f"-*-of-?????{variant}"}
        weights = [f"{name}{ending}.safetensors" for name in _WEIGHTS for ending in sorted(endings)]
        if self.is_part:
            return ["config.json", "*.index.json", *weights]
        return [*_CONFIGURATIONS, *(f"*/{each}" for each in weights)]

    @property
    def ignored(self) -> list[str]:
        """Patterns of the names of files that are not needed although they are allowed."""
        return [*(f"{folder}/*.safetensors" for folder in self.without), *(f"*/*{suffix}" for suffix in self.pickles)]


ONE_PART = HubFiles(is_part=True)
"""A VAE or a ControlNet."""
ANY_WEIGHTS = HubFiles(is_part=True, any_name=True)
"""An adapter."""
EMBEDDINGS = HubFiles(is_part=True, any_name=True, pickles=(".bin", ".pt"))
"""Embeddings of tokens. Many are published as pickles of tensors; their reader refuses everything else."""
CONFIGURATIONS = HubFiles(without_weights=True)
"""The configuration of a base that is one file."""


def fetch(name: str, revision: str | None, field: str, files: HubFiles) -> Path:
    """Return the local folder of a commit of a repository, after downloading what it lacks.

    Args:
        name: hub id.
        revision: branch, tag or commit; None for the main branch.
        field: field of the manifest, for messages.
        files: the files that are needed.

    Raises:
        ConfigError: they do not exist, or cannot be used.
        NetworkError: the hub cannot be reached.
        StorageOutageError: the cache is full, or fails.
    """
    from huggingface_hub import snapshot_download  # noqa: PLC0415  only hub ids need it
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError  # noqa: PLC0415

    def download() -> Path:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=files.allowed, ignore_patterns=files.ignored)
        )

    try:
        return patience.wait_out(f"{field}: fetching {name} from the hub", download)
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        # Another program may have filled the cache with other files of the repository than are allowed here.
        cached = None if isinstance(error, HFValidationError) else _find_cached(name, revision, files)
        if cached is not None:
            return cached
        summary = " ".join(str(error).split())[:200]
        at = f" at revision {revision}" if revision else ""
        raise ConfigError(f"{field}: cannot fetch {name}{at} from the hub: {summary}") from error


def limit_waits() -> None:
    """Set a timeout for all requests of the hub's library. Some have none: a silent server would stop them for ever."""
    import huggingface_hub  # noqa: PLC0415  slow to import
    from huggingface_hub import constants  # noqa: PLC0415
    from huggingface_hub.utils import _http  # noqa: PLC0415

    seconds = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)

    def limit(request: Any) -> None:
        timeouts = dict(request.extensions.get("timeout") or {})
        for name in ("connect", "read", "write", "pool"):
            if timeouts.get(name) is None:
                timeouts[name] = seconds
        request.extensions = {**request.extensions, "timeout": timeouts}

    def make_client() -> Any:
        client = _http.default_client_factory()
        hooks = client.event_hooks
        client.event_hooks = {**hooks, "request": [*hooks["request"], limit]}
        return client

    # Releases before 1.0 have no such function, and always set a timeout for downloads.
    if hasattr(huggingface_hub, "set_client_factory"):
        huggingface_hub.set_client_factory(make_client)


def _find_cached(name: str, revision: str | None, files: HubFiles) -> Path | None:
    """Return the folder of a repository in the cache if it has a part of every kind that is needed; None if not."""
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415  only hub ids need it

    index = "config.json" if files.is_part else "model_index.json"
    found = try_to_load_from_cache(name, index, revision=revision)
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    if files.without_weights:
        return folder
    parts = [folder] if files.is_part else [path.parent for path in folder.glob("*/config.json")]
    needed = [part for part in parts if part.name not in files.without]
    return folder if needed and all(has_weights(part, files.variant) for part in needed) else None


def has_weights(part: Path, variant: str | None) -> bool:
    """Return whether the folder of a part has weights of a variant; None for any weights."""
    pattern = f"*.{variant}*.safetensors" if variant else "*.safetensors"
    return any(part.glob(pattern))
