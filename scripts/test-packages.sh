#!/bin/sh
# What only the tests need from Debian: the PostgreSQL server. They start one of their own in a temporary directory, so
# the package must not make one for the host.
set -eu

for initdb in /usr/lib/postgresql/*/bin/initdb; do
    [ -x "$initdb" ] && exit 0
done
if ! command -v apt-get > /dev/null; then
    echo "install PostgreSQL's server to /usr/lib/postgresql/<version>, then try again" >&2
    exit 1
fi
config=/etc/postgresql-common/createcluster.conf
if [ ! -e "$config" ]; then
    mkdir -p "${config%/*}"
    echo "create_main_cluster = false" > "$config"
fi
export DEBIAN_FRONTEND=noninteractive
apt-get -q update
exec apt-get -q install --yes --no-install-recommends -o Dpkg::Options::=--force-confold postgresql
