#!/bin/sh
# Fetch the example scripts of the installed release of diffusers: examples.sh APP TARGET. Runs in the build stage
# `examples` of the trainer's Dockerfiles. Without DIFFUSERS_SHA256 the target is an empty folder.
set -eu
app=$1 target=$2
mkdir -p "$target"
if [ -z "${DIFFUSERS_SHA256:-}" ]; then
    exit 0
fi
version=$("$app/bin/python" -c 'from importlib.metadata import version; print(version("diffusers"))')
archive=$(mktemp)
"$app/bin/python" -c 'import sys, urllib.request; urllib.request.urlretrieve(*sys.argv[1:])' \
    "$DIFFUSERS_SOURCES/archive/refs/tags/v$version.tar.gz" "$archive"
echo "$DIFFUSERS_SHA256  $archive" | sha256sum --check -
tar --extract --file "$archive" --directory "$target" --strip-components 2 --wildcards '*/examples/*'
rm "$archive"
