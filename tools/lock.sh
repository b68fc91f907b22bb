#!/bin/sh
# Rewrite the lock files in requirements/ from pyproject.toml: every version pinned, every file by hash, no addresses.
# Usage: tools/lock.sh UV [--upgrade]
set -eu
uv=$1; shift
compile() { # NAME, then one --extra per extra
    out=$1; shift
    "$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
        --no-emit-find-links --no-annotate --no-header pyproject.toml "$@" -o "requirements/$out.txt" >/dev/null
}
compile dev --extra operator --extra trainer --extra dev "$@"
# The images use the versions that the tests use.
compile operator --extra operator --constraint requirements/dev.txt "$@"
compile trainer --extra trainer --extra trackers --constraint requirements/dev.txt "$@"
compile trainer-cuda --extra trainer --extra trackers --extra cuda --constraint requirements/dev.txt "$@"
# With Intel's last pair, which needs an older torch.
"$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
    --no-emit-find-links --no-annotate --no-header pyproject.toml --extra trainer --extra trackers \
    requirements/trainer-intel.in -o requirements/trainer-intel.txt >/dev/null
# What `make test-intel` installs: the same packages, and oneCCL.
"$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
    --no-emit-find-links --no-annotate --no-header pyproject.toml --extra operator --extra trainer --extra trackers \
    requirements/trainer-intel.in requirements/intel.in --constraint requirements/trainer-intel.txt \
    -o requirements/intel.txt >/dev/null
# What tests/readers reads our outputs with, on the same torch: it takes no additional space.
torch=$(mktemp)
trap 'rm -f "$torch"' EXIT
grep '^torch==' requirements/dev.txt | tr -d ' \\' > "$torch"
"$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
    --no-emit-find-links --no-annotate --no-header requirements/readers-oldest.in \
    --constraint "$torch" -o requirements/readers-oldest.txt >/dev/null
# The oldest supported releases, for `make test-oldest`.
"$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
    --no-emit-find-links --no-annotate --no-header pyproject.toml --extra operator --extra trainer \
    requirements/oldest.in -o requirements/oldest.txt >/dev/null
# What OpenVINO outputs are written and read with. optimum-intel needs older releases of diffusers and transformers.
"$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
    --no-emit-find-links --no-annotate --no-header pyproject.toml --extra trainer --extra export \
    --constraint "$torch" -o requirements/export.txt >/dev/null
# What `make test-export` installs: the same packages, and those of the tests.
"$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
    --no-emit-find-links --no-annotate --no-header pyproject.toml --extra operator --extra trainer --extra export \
    requirements/export-tests.in --constraint requirements/export.txt -o requirements/export-tests.txt >/dev/null
"$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
    --no-emit-find-links --no-annotate --no-header requirements/bootstrap.in -o requirements/bootstrap.txt >/dev/null
