#!/usr/bin/env bash
# Installs what the tests in this folder need from Debian's or Ubuntu's packages: a Slurm without services, and
# a linter of shell scripts. As root; does nothing where everything is there already. For CI: the tests themselves install nothing.
set -euo pipefail

PROGRAMS=(slurmctld slurmd sbatch srun munged shellcheck)
PACKAGES=(slurmctld slurmd slurm-client munge shellcheck)
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

missing=()
for program in "${PROGRAMS[@]}"; do
    command -v "$program" >/dev/null || missing+=("$program")
done
if [ ${#missing[@]} -eq 0 ]; then
    exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "install.sh: missing ${missing[*]}: run as root on Debian or Ubuntu, or install them yourself" >&2
    exit 1
fi

# The packages would start their services, whose configuration does not exist; policy-rc.d keeps them from it.
if [ ! -e /usr/sbin/policy-rc.d ]; then
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
    chmod 755 /usr/sbin/policy-rc.d
fi
log=$(mktemp)
if ! { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 \
    install --no-install-recommends "${PACKAGES[@]}"; } >"$log" 2>&1 </dev/null; then
    tail -n 15 "$log" >&2
    echo "install.sh: apt-get failed; see $log" >&2
    exit 1
fi
rm -f "${log:?}"
