#!/usr/bin/env bash
# kubernetes 37.0.2 (Python, kubernetes.aio) and kube-apiserver 1.34.4: an object with a character beyond U+FFFF cannot be applied.
#
# `DynamicClient.server_side_apply` writes the object as JSON and calls it YAML (`application/apply-patch+yaml`). Its JSON is ASCII:
# a character beyond U+FFFF becomes two escapes, the halves of a UTF-16 pair. In JSON these are one character. YAML knows no such
# pairs, and the API server reads the body with sigs.k8s.io/yaml 1.6.0, which refuses the first half: "error converting YAML to
# JSON: yaml: found invalid Unicode character escape code", status 400. `create` and merge patches, which are JSON on both sides,
# take the same object; other characters (umlauts, Chinese) pass everywhere. So one emoji in an annotation or in a person's text
# keeps an operator from applying an object that the API server itself stores and returns.
#
# What follows for users of the client: apply with a body of UTF-8 bytes of your own, in which no character is escaped.
# Seen on 2026-11-29, Python 3.11, Go 1.26. The server below listens on loopback and keeps what the client sends; the Go program
# is the conversion that the API server makes first.
set -euo pipefail
folder=$(mktemp -d)
trap 'chmod -R u+w "$folder"; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check kubernetes==37.0.2 aiohttp==3.14.5
cat >"$folder/send.py" <<'PY'
import asyncio
import sys
from pathlib import Path

from aiohttp import web
from kubernetes.aio import client, dynamic

FOLDER = Path(sys.argv[1])
RESOURCES = {
    "kind": "APIResourceList",
    "groupVersion": "v1",
    "resources": [{"name": "configmaps", "kind": "ConfigMap", "namespaced": True, "verbs": ["patch"]}],
}


async def api(request: web.Request) -> web.Response:
    if request.method == "PATCH":
        (FOLDER / "body").write_bytes(await request.read())
        print("content type:", request.content_type)
        return web.json_response({"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": "demo"}})
    if request.path == "/version":
        return web.json_response({"major": "1", "minor": "34"})
    if request.path == "/api":
        return web.json_response({"kind": "APIVersions", "versions": ["v1"]})
    if request.path == "/apis":
        return web.json_response({"kind": "APIGroupList", "groups": []})
    return web.json_response(RESOURCES)


async def main() -> None:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", api)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    async with client.ApiClient(client.Configuration(host=f"http://127.0.0.1:{port}")) as connection:
        known = await dynamic.DynamicClient(connection)
        kind = await known.resources.get(api_version="v1", kind="ConfigMap")
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "demo"}, "data": {"team": "rockets \U0001f680"}}
        await known.server_side_apply(kind, body=body, name="demo", namespace="default", field_manager="demo")
    await runner.cleanup()


asyncio.run(main())
PY
"$folder/venv/bin/python" "$folder/send.py" "$folder" | tee "$folder/sent"
cat "$folder/body"; echo
mkdir "$folder/read" && cd "$folder/read"
cat >go.mod <<'GO'
module read

go 1.24

require sigs.k8s.io/yaml v1.6.0
GO
cat >main.go <<'GO'
package main

import (
	"fmt"
	"io"
	"os"

	"sigs.k8s.io/yaml"
)

func main() {
	body, _ := io.ReadAll(os.Stdin)
	if _, err := yaml.YAMLToJSON(body); err != nil {
		fmt.Println("refused:", err)
		return
	}
	fmt.Println("taken")
}
GO
GOFLAGS=-mod=mod go build -o read . 2>/dev/null
as_sent=$(./read <"$folder/body")
as_utf8=$("$folder/venv/bin/python" -c 'import json, sys; sys.stdout.buffer.write(json.dumps(json.load(sys.stdin), ensure_ascii=False).encode())' <"$folder/body" | ./read)
echo "as the client sends it: $as_sent"
echo "the same as UTF-8: $as_utf8"
grep -q 'application/apply-patch+yaml' "$folder/sent"
[[ $as_sent == "refused: yaml: found invalid Unicode character escape code" && $as_utf8 == taken ]] || { echo "this has changed" >&2; exit 1; }
