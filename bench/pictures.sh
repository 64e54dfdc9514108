#!/usr/bin/env bash
# Draws docs/status.svg and docs/experts-show.svg from real runs on the tiny model; called by `make pictures`.
set -euo pipefail

state=(--state-dir .cache/pictures)
port=18000

# picture MANIFEST NAME FILE SECONDS COMMAND...: serves, sends requests for a while, draws the command's output.
picture() {
  local manifest=$1 name=$2 file=$3 seconds=$4
  shift 4
  "$BIN/moeserving" up -f "$manifest" --port "$port" --detach "${state[@]}"
  trap '"$BIN/moeserving" down "$name" "${state[@]}"' RETURN
  "$BIN/moeserving" replay --url "http://127.0.0.1:$port" --shape random --rate 3 --limit $((seconds * 4)) >/dev/null &
  sleep "$seconds"
  "$BIN/python" -m moe_lab.terminal_picture "$file" --title "moeserving $* $name" -- \
    "$BIN/moeserving" "$@" "$name" "${state[@]}"
  wait
}

picture manifests/local-cpu.yaml tiny docs/status.svg 30 status
picture manifests/local-cpu-experts.yaml tiny-experts docs/experts-show.svg 90 experts show
