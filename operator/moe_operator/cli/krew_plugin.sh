#!/bin/sh
# `kubectl moeserving` from an unpacked wheel, as krew installs it; pip brings the packages that it needs.
here=$(dirname "$(readlink -f "$0")")
PYTHONPATH="$here/../..${PYTHONPATH:+:$PYTHONPATH}" exec "${MOESERVING_PYTHON:-python3}" -m moe_operator.cli "$@"
