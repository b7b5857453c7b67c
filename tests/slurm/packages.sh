#!/usr/bin/env bash
# usage: tests/slurm/packages.sh
#
# Installs what the tests' Slurm cluster needs, on Debian and its kin, where it is missing. Starts no daemon.

set -euo pipefail

packages=(slurmctld slurmd slurm-client munge iproute2)
programs=(slurmctld slurmd sbatch munged ip)

refuse() { # MESSAGE FIX
    printf 'packages.sh: %s\n    fix: %s\n' "$1" "$2" >&2
    exit 8
}

missing() {
    local program
    for program in "${programs[@]}"; do
        PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || return 0
    done
    return 1
}

[ "$(id -u)" = 0 ] || refuse "a Slurm cluster needs root" "run it as root, in a container of its own"
missing || exit 0
command -v apt-get >/dev/null || refuse "no apt-get here" "install Slurm, munge and iproute2 in this system's own way"

# Debian asks this script before a package starts its daemon, and 101 forbids it. One that is there is left alone.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
fi
echo "[test-slurm] installing ${packages[*]}"
export DEBIAN_FRONTEND=noninteractive
install=(apt-get install -qq -y --no-install-recommends "${packages[@]}")
if ! "${install[@]}" >/dev/null 2>&1; then
    # the lists of a fresh container are empty
    apt-get update -qq
    said=$("${install[@]}" 2>&1) || refuse "apt-get: $said" "install them by hand: ${packages[*]}"
fi
! missing || refuse "the packages are installed and a program of ${programs[*]} is not there" "look at dpkg -L slurmd"
