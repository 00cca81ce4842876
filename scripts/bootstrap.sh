#!/bin/sh
# The first two steps of set-up, which need no Python package: an interpreter that can make virtual environments, and
# .venv with the packages of the hash-pinned requirements. `rds setup` does the rest.
#
#   scripts/bootstrap.sh          what the server needs
#   scripts/bootstrap.sh dev      and what its tests need
#
# Safe to interrupt, to repeat and to run twice at once: the stamp is written last and read first.
set -eu
cd "$(dirname "$0")/.."

STEPS=6 # of these, `rds setup` shows the last four
OLDEST=11 # Python 3.x
VENV=.venv

requirements=requirements.txt
[ "${1-}" = dev ] && requirements=requirements-dev.txt

now() { date +%s.%N; }

# begin NUMBER NAME; end FACT
begin() {
    step=$(printf '[%d/%d] %-16s' "$1" "$STEPS" "$2")
    started=$(now)
}
end() {
    seconds=$(awk -v a="$started" -v b="$(now)" 'BEGIN { printf "%.1f", b - a }')
    printf '%s %s  (%s s)\n' "$step" "$1" "$seconds"
}
fail() {
    printf '%s failed\n' "${step-set-up}" >&2
    printf '  %s\n' "$@" >&2
    exit 1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo -- "$@"
    else
        fail "this needs root and there is no sudo: $*"
    fi
}

# Run a command, showing its output only when it fails.
quietly() {
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    "$@" >"$log" 2>&1 </dev/null || {
        cat "$log" >&2
        fail "this command failed: $*"
    }
    rm -f "$log"
    trap - EXIT
}

# Prints the newest usable interpreter. A name in PATH is not enough: version managers leave ones that do not run.
find_python() {
    for name in python3.13 python3.12 python3.11 python3 python3.14; do
        if "$name" -c "import sys; sys.exit(sys.version_info < (3, $OLDEST))" >/dev/null 2>&1; then
            command -v "$name"
            return
        fi
    done
}

apt_install() {
    command -v apt-get >/dev/null || fail "please install: $*"
    printf '%s installing %s\n' "$step" "$*"
    as_root env DEBIAN_FRONTEND=noninteractive sh -c \
        'apt-get -qq update && apt-get -qq -o DPkg::Lock::Timeout=600 install --yes --no-install-recommends "$@"' \
        sh "$@" >"${TMPDIR:-/tmp}/rds-apt.$$" 2>&1 </dev/null || {
        cat "${TMPDIR:-/tmp}/rds-apt.$$" >&2
        rm -f "${TMPDIR:-/tmp}/rds-apt.$$"
        fail "apt-get could not install: $*"
    }
    rm -f "${TMPDIR:-/tmp}/rds-apt.$$"
}

prepare_python() {
    begin 1 Python
    python=$(find_python)
    if [ -z "$python" ] && ! command -v python3 >/dev/null; then
        apt_install python3 python3-venv
        python=$(find_python)
    fi
    if [ -z "$python" ]; then
        found=$(python3 --version 2>&1 || echo 'no Python')
        fail "$found is too old: Python 3.$OLDEST or newer is needed." \
            "On Ubuntu 22.04: sudo apt install python3.11 python3.11-venv (from universe), then try again."
    fi
    if ! "$python" -c 'import venv, ensurepip' >/dev/null 2>&1; then
        apt_install "$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    fi
    end "$("$python" -c 'import platform; print(platform.python_version())') ($python)"
}

# The stamp names all that .venv depends on; a moved checkout or another Python makes a new one.
stamp_of() {
    { sha256sum "$requirements" && echo "$PWD $requirements" && readlink -f "$VENV/bin/python3"; } 2>/dev/null | sha256sum
}

is_current() {
    [ -x "$VENV/bin/rds" ] && [ "$(cat "$VENV/.stamp-$requirements" 2>/dev/null)" = "$(stamp_of)" ] &&
        "$VENV/bin/python" -S -c ''
}

make_venv() {
    # An environment that a newer system Python left behind does not run.
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        rm -rf "$VENV"
        quietly "$python" -m venv "$VENV"
    fi
    quietly "$VENV/bin/python" -m pip install --disable-pip-version-check --no-input --require-hashes -r "$requirements"
    # The package is used where it lies: no build, no copy that could be stale.
    "$VENV/bin/python" - "$PWD/src" <<'END'
import pathlib, sys, sysconfig
pathlib.Path(sysconfig.get_path("purelib"), "rundatsheesh-src.pth").write_text(sys.argv[1] + "\n")
END
    printf '#!/bin/sh\nexec "%s/bin/python" -m rundatsheesh.cli "$@"\n' "$PWD/$VENV" >"$VENV/bin/rds.new"
    chmod 755 "$VENV/bin/rds.new"
    mv "$VENV/bin/rds.new" "$VENV/bin/rds"
    stamp_of >"$VENV/.stamp-$requirements"
}

# Take turns: the lock is on this directory's own file and ends with this process.
exec 9>.bootstrap.lock
if is_current; then
    started=$(now)
    step=$(printf '[%d/%d] %-16s' 1 "$STEPS" Python)
    end "$(readlink -f "$VENV/bin/python3")"
    begin 2 "Python packages"
    end "all present"
    exit 0
fi
flock 9
prepare_python
begin 2 "Python packages"
if is_current; then
    end "all present"
else
    printf '%s installing %s\n' "$step" "$requirements"
    make_venv
    end "$(grep -c '==' "$requirements") packages of $requirements"
fi
