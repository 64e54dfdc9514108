#!/usr/bin/env bash
# mkdocs 1.6.1: `mkdocs build --strict --quiet` ends with status 0 where links lead nowhere.
#
# `--quiet` sets the level of the logger `mkdocs` to ERROR. The handler that counts warnings for `--strict` hangs at the same
# logger, so it sees none, and the build that fails without `--quiet` succeeds with it. The documentation names `--quiet` as
# "Silence warnings", not as the end of strict checks.
#
# What follows for users: leave `--quiet` out of checks, and send the output away instead.
# Seen on 2026-11-30, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check mkdocs==1.6.1
mkdir "$folder/docs"
printf '# Page\n\n[a link](nowhere.md)\n' >"$folder/docs/index.md"
printf 'site_name: Demo\n' >"$folder/mkdocs.yml"
cd "$folder"
status() { "$folder/venv/bin/mkdocs" build "$@" >/dev/null 2>&1 && echo 0 || echo $?; }
strict=$(status --strict)
quiet=$(status --strict --quiet)
echo "status with --strict: $strict; with --strict --quiet: $quiet"
[ "$strict" = 1 ] && [ "$quiet" = 0 ] || { echo "behaves otherwise now" >&2; exit 1; }
