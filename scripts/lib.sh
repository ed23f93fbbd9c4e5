# shellcheck shell=bash
# Shared by the scripts beside it: where things are, plain messages, refusals in three lines.
# To be sourced by bash; sets $top (the checkout) and $target (cargo's output).

set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
top=$(dirname -- "$here")
target=${CARGO_TARGET_DIR:-$top/target}
case $target in /*) ;; *) target=$top/$target ;; esac

say() { printf '%s\n' "$@"; }

# refuse WHAT WHY NEXT: the three lines of the product's own errors.
refuse() {
    printf 'error: %s\n  why: %s\n  next: %s\n' "$1" "$2" "$3" >&2
    exit 1
}

need_root() {
    [ "$(id -u)" = 0 ] || refuse "$1 needs root" "it mounts file systems and installs packages" "sudo $1"
}

# The seconds since the shell started, as a number that can be subtracted.
seconds() { printf '%s' "$SECONDS"; }

# wait_for SECONDS COMMAND...: until the command succeeds; 1 when the time is over.
wait_for() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 0.1
    done
}

# stop_pid PID: ends a process that we started, politely and then for certain, and reaps it.
stop_pid() {
    local pid=$1
    [ -n "$pid" ] || return 0
    kill "$pid" 2>/dev/null || { wait "$pid" 2>/dev/null || true; return 0; }
    for _ in $(seq 50); do
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    kill -9 "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
}

# unmount DIR: gone when it returns, whatever is still open below it.
unmount() {
    mountpoint -q -- "$1" 2>/dev/null || [ "$(stat -c %m -- "$1" 2>/dev/null || echo gone)" = gone ] || return 0
    umount -- "$1" 2>/dev/null || umount -l -- "$1" 2>/dev/null || true
}
