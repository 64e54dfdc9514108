#!/bin/sh
# install.sh EXTRA...: installs this checkout with these extras (operator, gateway, epp, agent, cpu, transfer) into the Python that comes first in PATH.
# Versions are those of constraints.txt; what the base image has already stays as it is. Used by every Dockerfile here and by the end-to-end tests.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
extras=$(echo "$*" | tr ' ' ',')
python=$(command -v python || command -v python3)
set -- --constraint "$root/constraints.txt"
# The CPU build of vLLM pins a build of torch that exists on one index alone; overrides.txt names the one that is everywhere.
case ",$extras," in *,cpu,*) set -- "$@" --override "$root/overrides.txt" ;; esac
"$python" -m pip install --quiet --no-cache-dir --disable-pip-version-check --constraint "$root/constraints.txt" uv
"$python" -m uv pip install --quiet --no-cache --compile-bytecode --python "$python" --reinstall-package moeserving "$@" "$root[$extras]"
"$python" -m pip uninstall --quiet --yes uv
moeserving --help >/dev/null
