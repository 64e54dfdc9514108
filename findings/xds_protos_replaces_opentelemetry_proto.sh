#!/usr/bin/env bash
# xds-protos 1.85.0 (Python, the gRPC project's package of Envoy's API) beside opentelemetry-proto 1.45.2 and
# googleapis-common-protos 1.76.0: it installs older copies of their modules under the same paths.
#
# 22 modules of opentelemetry-proto and 59 of googleapis-common-protos have a second owner. Whichever package is installed
# last decides which file is there; pip reports no conflict, `pip check` finds nothing. With xds-protos last, the OTLP
# exporter of OpenTelemetry 1.45.2 cannot be imported. Removing xds-protos would then remove the files of the others.
#
# What follows: an extension of Envoy in Python that also exports traces cannot take its messages from this package.
# Seen on 2026-11-30, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
install() { "$folder/venv/bin/pip" install -q --disable-pip-version-check "$@"; }
export_traces() { "$folder/venv/bin/python" -c "import opentelemetry.exporter.otlp.proto.http.trace_exporter; print('imported')" 2>&1 | tail -n 1 || true; }
install protobuf==7.36.2 googleapis-common-protos==1.76.0 opentelemetry-proto==1.45.2 opentelemetry-exporter-otlp-proto-http==1.45.2
before=$(export_traces)
install grpcio==1.85.3 xds-protos==1.85.0
"$folder/venv/bin/pip" check --disable-pip-version-check
after=$(export_traces)
cat >"$folder/count.py" <<'PY'
from importlib.metadata import files

theirs = {str(path) for path in files("xds-protos")}
counts = []
for name in ("opentelemetry-proto", "googleapis-common-protos"):
    shared = [path for path in files(name) if path.suffix == ".py" and str(path) in theirs]
    counts.append(len(shared))
    print(f"modules of {name} that xds-protos has, too: {len(shared)}")
assert counts == [22, 59], counts
PY
"$folder/venv/bin/python" "$folder/count.py"
echo "before xds-protos: $before"
echo "after: ${after%% (*}"
[ "$before" = imported ]
[[ "$after" == "ImportError: cannot import name 'InstrumentationScope'"* ]]
# Output seen:
# No broken requirements found.
# modules of opentelemetry-proto that xds-protos has, too: 22
# modules of googleapis-common-protos that xds-protos has, too: 59
# before xds-protos: imported
# after: ImportError: cannot import name 'InstrumentationScope' from 'opentelemetry.proto.common.v1.common_pb2'
