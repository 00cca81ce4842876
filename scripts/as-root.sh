#!/bin/sh
# Run a command as root with this environment: directly where we are root, else by sudo.
set -eu
[ "$(id -u)" = 0 ] && exec "$@"
command -v sudo >/dev/null || {
    echo "this needs root and there is no sudo: $*" >&2
    exit 1
}

# A signal cannot be sent to sudo by those who started it, so it is passed on the way it came: by sudo.
sudo -v
sudo -E -- "$@" <&0 &
child=$!
relay() {
    sudo -n sh -c 'kill -TERM "$1"' sh "$child" || echo "cannot signal process $child: end it with sudo kill" >&2
}
trap relay TERM INT HUP
status=0
wait "$child" || status=$?
while [ "$status" -gt 128 ] && [ -d "/proc/$child" ]; do
    status=0
    wait "$child" || status=$?
done
exit "$status"
