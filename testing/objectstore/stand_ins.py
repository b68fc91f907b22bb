"""Stand-ins for Google Cloud Storage and Azure Blob Storage: fake-gcs-server and Azurite, as processes.

They are programs of others that answer the requests of the stores' clients; the real services need accounts. `install`
builds the first with Go and installs the second with npm, both into the cache; `make test-stores` calls it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from testing.controlplane.build import GCS_STAND_IN, cache_folder, ensure_programs
from testing.controlplane.process import LOOPBACK, Guard, Program, free_ports, wait_for
from testing.objectstore.server import answers

AZURITE = "3.35.0"
ACCOUNT = "devstoreaccount1"
# The key that Azurite publishes for its only account.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
SWITCH = "FINETUNE_STORES"
"""Environment variable with which the tests of the stand-ins run."""


def azurite_program() -> Path:
    """Return the program of Azurite, whether it is installed or not."""
    return cache_folder() / f"azurite-{AZURITE}" / "node_modules/azurite/dist/src/blob/main.js"


def install() -> None:
    """Build and install both.

    Raises:
        subprocess.CalledProcessError: npm fails.
        BuildError: the build fails.
    """
    ensure_programs(print_line=lambda line: print(line, flush=True), modules=[GCS_STAND_IN])
    program = azurite_program()
    if not program.exists():
        folder = program.parents[4]
        folder.mkdir(parents=True, exist_ok=True)
        print(f"installing azurite {AZURITE} with npm", flush=True)
        command = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), f"azurite@{AZURITE}"]
        subprocess.run(command, check=True, stdout=sys.stderr)


def start_gcs(folder: Path, guard: Guard) -> Mapping[str, str]:
    """Start the stand-in for Google's storage. Return the variables of its clients."""
    program = ensure_programs(modules=[GCS_STAND_IN])["fake-gcs-server"]
    (port,) = free_ports(1)
    address = f"http://{LOOPBACK}:{port}"
    command = [str(program), "-scheme", "http", "-host", LOOPBACK, "-port", str(port), "-backend", "memory"]
    command += ["-external-url", address, "-public-host", f"{LOOPBACK}:{port}"]
    _start("fake-gcs-server", command, folder, guard, f"{address}/storage/v1/b")
    return {"STORAGE_EMULATOR_HOST": address}


def start_azure(folder: Path, guard: Guard) -> Mapping[str, str]:
    """Start the stand-in for Azure's storage. Return the variables of its clients."""
    (port,) = free_ports(1)
    address = f"http://{LOOPBACK}:{port}/{ACCOUNT}"
    command = ["node", str(azurite_program()), "--blobHost", LOOPBACK, "--blobPort", str(port), "--silent"]
    command += ["--skipApiVersionCheck", "--inMemoryPersistence", "--disableTelemetry"]
    _start("azurite", command, folder, guard, address)
    values = {"AccountName": ACCOUNT, "AccountKey": KEY, "BlobEndpoint": address}
    text = "".join(f"{name}={value};" for name, value in values.items())
    return {"AZURE_STORAGE_CONNECTION_STRING": f"DefaultEndpointsProtocol=http;{text}"}


def is_enabled() -> bool:
    """Return whether the tests of the stand-ins run."""
    return bool(os.environ.get(SWITCH))


def _start(name: str, command: list[str], folder: Path, guard: Guard, url: str) -> None:
    program = Program(name, command, folder / f"{name}.log", guard)
    program.start()
    wait_for(f"{name} answers", lambda: program.has_exited or answers(url))
    if program.has_exited:
        raise RuntimeError("\n".join(program.tail()))


if __name__ == "__main__":
    install()
