"""Writes the certificate authority of the coordinator into the ConfigMaps of the jobs, where supervisors read it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from finetune_operator.cluster.kube.client.client import MERGE, NOT_FOUND, PARTIAL, ApiError, KubeApi, NotLeaderError
from finetune_operator.cluster.kube.client.objects import CONFIGS
from finetune_operator.manifests.layout import CA_FILE

log = logging.getLogger(__name__)

RETRY_SECONDS = 5.0


async def distribute(api: KubeApi, keys: Iterable[tuple[str, str]], authority: str) -> None:
    """Write an authority into existing ConfigMaps; retry while the API server is not available.

    Args:
        api: where to write.
        keys: namespace and name of each ConfigMap. One that is deleted meanwhile is skipped.
        authority: certificates, as PEM.
    """
    for key in keys:
        while True:
            if await _is_written(api, key, authority):
                break
            await asyncio.sleep(RETRY_SECONDS)


async def _is_written(api: KubeApi, key: tuple[str, str], authority: str) -> bool:
    """Write one ConfigMap; return whether nothing remains to be done."""
    change = {"data": {CA_FILE: authority}}
    try:
        await api.request("PATCH", CONFIGS.path(*key), change, content_type=MERGE, accept=PARTIAL)
    except NotLeaderError:
        return False
    except ApiError as error:
        if error.status != NOT_FOUND:
            log.warning("cannot write the certificate authority into the ConfigMap %s/%s: %s", *key, error)
        return not error.transient
    return True
