#!/usr/bin/env bash
# grafana-foundation-sdk (Python), released 2026-01-29: `>=11` installs the SDK of Grafana 10.1.
#
# Its versions are an epoch and Grafana's version: `1769699998!10.1.0`, `1769699379!11.6.0`. The epoch is a Unix time, and
# of one day's releases the SDK of the oldest Grafana has the latest. An epoch outweighs everything behind it. So the
# greatest version is that of the oldest Grafana, `>=11.6` is satisfied by 10.1.0, and an upgrade goes from the models of
# Grafana 11.6 to those of 10.1: dashboards get the schema version 36 in place of 41.
#
# What follows: pin the version with its epoch (`==1769699379!11.6.0`); let no tool upgrade it.
# Seen on 2026-11-30, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" --disable-pip-version-check)
# Both releases of that day, and nothing newer, so that the script goes on saying the same.
"${pip[@]}" download -q --no-deps -d "$folder/files" 'grafana-foundation-sdk==1769699379!11.6.0'
"${pip[@]}" download -q --no-deps -d "$folder/files" 'grafana-foundation-sdk==1769699998!10.1.0'
cat >"$folder/run.py" <<'PY'
import json
from importlib.metadata import version

from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder

built = json.loads(JSONEncoder().encode(Dashboard("any").build()))
print(version("grafana-foundation-sdk"), "schema version", built["schemaVersion"])
PY
show() {
  "${pip[@]}" install -q --no-index --find-links "$folder/files" --upgrade "$1"
  "$folder/venv/bin/python" "$folder/run.py"
}
pinned=$(show 'grafana-foundation-sdk==1769699379!11.6.0')
asked=$(show 'grafana-foundation-sdk>=11.6')
printf 'pinned:      %s\nasked >=11.6: %s\n' "$pinned" "$asked"
[ "$pinned" = "1769699379!11.6.0 schema version 41" ]
[ "$asked" = "1769699998!10.1.0 schema version 36" ]
# Output seen:
# pinned:      1769699379!11.6.0 schema version 41
# asked >=11.6: 1769699998!10.1.0 schema version 36
