#!/usr/bin/env bash
# Kubernetes quantities by kubernetes 37.0.2 and lightkube 1.0.1 (Python) and @kubernetes/client-node 2.0.1 (JavaScript), against
# k8s.io/apimachinery 0.37.2, with which the API server reads them.
#
# - lightkube knows neither nano nor micro: the processor time that metrics-server reports ("95647727n") raises ValueError.
# - client-node makes a BigInt of the number before a suffix: "1.5Gi" raises SyntaxError. The API server turns what it knows into
#   1536Mi, but not what stands in a custom resource: pod templates of LeaderWorkerSets and the like keep what was written. Its
#   results are numbers or BigInts, by the suffix ("1e9" and "1Gi"), which JavaScript does not add.
# - kubernetes for Python takes what the API server refuses: "1K" and "1 Gi". A check by it passes, the object does not.
# lightkube's and kubernetes' descriptions name Kubernetes' own definition; none says what it reads otherwise.
#
# Who is hurt: operators and dashboards that add up requests or usage. What follows: test them with "n", a fraction and "e".
# Seen on 2026-12-01, Python 3.11, Node 20, Go 1.26.
set -euo pipefail
folder=$(mktemp -d)
trap 'chmod -R u+w "$folder"; rm -rf "$folder"' EXIT
cd "$folder"
(npm init -y && npm install --silent --no-audit --no-fund @kubernetes/client-node@2.0.1) >npm.log 2>&1 &
python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check kubernetes==37.0.2 lightkube==1.0.1
wait "$!" || { tail -5 npm.log >&2; exit 1; }
mkdir reference
cat >reference/go.mod <<'GO'
module reference

go 1.26.0

require k8s.io/apimachinery v0.37.2
GO
cat >reference/main.go <<'GO'
package main

import (
	"fmt"
	"os"

	"k8s.io/apimachinery/pkg/api/resource"
)

func main() {
	for _, text := range os.Args[1:] {
		if quantity, err := resource.ParseQuantity(text); err != nil {
			fmt.Println("refused")
		} else {
			fmt.Println(quantity.AsApproximateFloat64())
		}
	}
}
GO
cat >read.py <<'PY'
import sys
from collections.abc import Callable

from kubernetes.utils.quantity import parse_quantity
from lightkube.utils.quantity import parse_quantity as parse_by_lightkube


def read(parse: Callable[[str], object], text: str) -> str:
    try:
        return f"{float(parse(text)):g}"
    except ValueError:
        return "refused"


for text in sys.argv[1:]:
    print(read(parse_quantity, text), read(parse_by_lightkube, text))
PY
cat >read.mjs <<'JS'
import { quantityToScalar } from "@kubernetes/client-node/dist/util.js";

for (const text of process.argv.slice(2)) {
  try {
    console.log(Number(quantityToScalar(text)), typeof quantityToScalar(text));
  } catch (error) {
    console.log("refused", error.constructor.name);
  }
}
JS
(cd reference && GOFLAGS=-mod=mod go build -o read . 2>../go.log) || { tail -5 go.log >&2; exit 1; }
texts=(95647727n 1.5Gi 1e9 1Gi 1K "1 Gi")
paste -d '|' <(printf '%s\n' "${texts[@]}") <(reference/read "${texts[@]}") <(venv/bin/python read.py "${texts[@]}") <(node read.mjs "${texts[@]}") |
  while IFS='|' read -r text server python node; do
    echo "$text: API server $server, kubernetes ${python% *}, lightkube ${python#* }, client-node $node"
  done >seen
cat seen
cat >wanted <<'TEXT'
95647727n: API server 0.095647727, kubernetes 0.0956477, lightkube refused, client-node 0.095647727 number
1.5Gi: API server 1.610612736e+09, kubernetes 1.61061e+09, lightkube 1.61061e+09, client-node refused SyntaxError
1e9: API server 1e+09, kubernetes 1e+09, lightkube 1e+09, client-node 1000000000 number
1Gi: API server 1.073741824e+09, kubernetes 1.07374e+09, lightkube 1.07374e+09, client-node 1073741824 bigint
1K: API server refused, kubernetes 1000, lightkube refused, client-node refused Error
1 Gi: API server refused, kubernetes 1.07374e+09, lightkube refused, client-node refused Error
TEXT
diff wanted seen || { echo "behaves otherwise now" >&2; exit 1; }
