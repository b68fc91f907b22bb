"""Write the software bill of materials (SBOM) of an image as SPDX 2.3: its Python distributions and Debian packages.

Runs in the build of an image, with the Python of the image: sbom.py OUT NAME FOLDER[:FOLDER...] [FILE...]. FOLDER
contains Python packages. With FILE, only the Debian packages that own these files are listed; otherwise all.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

CREATED = "1970-01-01T00:00:00Z"
"""A constant, so that the same packages give the same document."""


def python_packages(*folders: str) -> list[dict[str, object]]:
    """Return an entry for every Python distribution in these folders."""
    found = {
        (dist.metadata["Name"], dist.version, dist.metadata.get("License-Expression") or "NOASSERTION")
        for dist in importlib.metadata.distributions(path=list(folders))
    }
    return [_package("pypi", name, version, licence) for name, version, licence in sorted(found)]


def debian_packages(files: Iterable[str] | None) -> list[dict[str, object]]:
    """Return an entry for every Debian package that owns one of the files; with None, for all installed packages."""
    listed = _run("dpkg-query", "--show", "--showformat=${Package} ${Version}\n").splitlines()
    versions = dict(line.split() for line in listed)
    names: Iterable[str] = versions
    if files is not None:
        names = {owner for file in files for owner in _owners(file)}
    return [_package("deb/debian", name, versions[name], "NOASSERTION") for name in sorted(names) if name in versions]


def write(out: Path, name: str, packages: list[dict[str, object]]) -> None:
    """Write the SPDX document for these packages and for Python."""
    own = _package("generic", "python", platform.python_version(), "PSF-2.0")
    document = {
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": name,
        "documentNamespace": f"https://finetune-operator.io/sbom/{name}",
        "creationInfo": {"created": CREATED, "creators": ["Tool: images/sbom.py"]},
        "packages": [own, *packages],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")


def _package(kind: str, name: str, version: str, licence: str) -> dict[str, object]:
    purl = f"pkg:{kind}/{name}@{version}"
    return {
        "SPDXID": f"SPDXRef-{kind.replace('/', '-')}-{name}".replace("_", "-"),
        "name": name,
        "versionInfo": version,
        "licenseDeclared": licence,
        "downloadLocation": "NOASSERTION",
        "externalRefs": [{"referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl", "referenceLocator": purl}],
    }


def _owners(file: str) -> list[str]:
    # Packages may list a file below /lib, from the time before /lib became a link to /usr/lib.
    for path in (file, file.removeprefix("/usr")):
        lines = _run("dpkg-query", "--search", path).splitlines()
        if lines:
            return [line.split(":")[0] for line in lines if not line.startswith("diversion")]
    return []


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


if __name__ == "__main__":
    out, name, folders, *files = sys.argv[1:]
    write(Path(out), name, [*python_packages(*folders.split(":")), *debian_packages(files or None)])
