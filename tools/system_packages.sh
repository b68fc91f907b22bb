#!/usr/bin/env bash
# Install the Debian packages that the tests on real nodes and of health checks need. Called by `make test`.
# Does nothing if they are installed, or if this is not a Debian system with root; the tests then skip and report the reason.
set -euo pipefail
tools=(buildah debootstrap iptables lua5.4)
type "${tools[@]}" > /dev/null 2>&1 && exit 0
[ "$(id -u)" = 0 ] && command -v apt-get > /dev/null || exit 0
echo "Installing ${tools[*]} for the tests"
{ apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${tools[@]}"; } \
    > /dev/null || echo "Could not install ${tools[*]}: some tests are skipped"
