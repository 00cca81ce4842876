#!/bin/sh
# What only the tests need from Debian: the PostgreSQL server, of which they start one of their own in a temporary
# directory, so that the package must not make one for the host; and cpio, to read what virtual machines boot from.
set -eu

missing=
for initdb in /usr/lib/postgresql/*/bin/initdb; do
    [ -x "$initdb" ] || missing=postgresql
done
command -v cpio > /dev/null || missing="$missing cpio"
[ -n "$missing" ] || exit 0
if ! command -v apt-get > /dev/null; then
    echo "install$missing (PostgreSQL's server to /usr/lib/postgresql/<version>), then try again" >&2
    exit 1
fi
config=/etc/postgresql-common/createcluster.conf
if [ ! -e "$config" ]; then
    mkdir -p "${config%/*}"
    echo "create_main_cluster = false" > "$config"
fi
export DEBIAN_FRONTEND=noninteractive
apt-get -q update
# shellcheck disable=SC2086 # names, one by one
exec apt-get -q install --yes --no-install-recommends -o Dpkg::Options::=--force-confold $missing
