#!/bin/sh
# Writes the locks in requirements/ anew from pyproject.toml: every version pinned, every file by its hash, no address.
# Usage: tools/lock.sh UV [--upgrade]
set -eu
uv=$1; shift
compile() { # name, then one --extra for each
    out=$1; shift
    "$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
        --no-emit-find-links --no-annotate --no-header pyproject.toml "$@" -o "requirements/$out.txt" >/dev/null
}
compile dev --extra operator --extra trainer --extra dev "$@"
# The images' locks take the versions that the tests ran with.
compile operator --extra operator --constraint requirements/dev.txt "$@"
compile trainer --extra trainer --constraint requirements/dev.txt "$@"
# With Intel's pair, which holds torch back.
"$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
    --no-emit-find-links --no-annotate --no-header pyproject.toml --extra trainer requirements/ipex.in \
    -o requirements/trainer-ipex.txt >/dev/null
"$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
    --no-emit-find-links --no-annotate --no-header requirements/bootstrap.in -o requirements/bootstrap.txt >/dev/null
