# `make demo` and `make test` need Python 3.11+, make and a package index; they set up .venv themselves.
SHELL := bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := $(VENV)/.demo
export HF_HUB_OFFLINE := 1
# Tests start hundreds of processes: compiling the package in each of them would take a minute in all.
export PYTHONDONTWRITEBYTECODE :=

FUZZ := hdf5 zarr safetensors index tombstone marker recipe collection export lmdb-meta lmdb-state

# The everyday tests compare what was written with what is read, and on a disk would mostly wait for its fsync. Where there
# is room they run in memory; `make test-long` (kills, damage, many processes) runs on the disk.
MEMORY := $(shell df -m --output=avail /dev/shm 2>/dev/null | awk 'NR == 2 && $$1 > 6000 {print "/dev/shm"}')

EVERYDAY := PYTEST_DEBUG_TEMPROOT=$(MEMORY) $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal --durations 12

# For the inner loop: no processes, no models, no servers.
QUICK := architecture backends entries format golden io segments store

.PHONY: demo docs test test-quick test-long test-quantized test-clients test-clients-long test-object-stores fuzz sanitize golden lint picture bench clean

demo: $(DEMO)
	$(BIN)/python -m bench.demo

# The linters run beside the tests; what they say comes after what those say, and either's failure is a failure.
test: $(READY) $(VENV)/.ray
	@$(MAKE) --no-print-directory lint >$(VENV)/lint.log 2>&1 & lint=$$!; \
	$(EVERYDAY) -m "not long"; tested=$$?; \
	wait $$lint; linted=$$?; echo "lint:"; cat $(VENV)/lint.log; \
	if [ $$tested != 0 ]; then exit $$tested; fi; exit $$linted

test-quick: $(READY)
	$(EVERYDAY) -m "not long and not processes" --ignore tests/segments/objects $(QUICK:%=tests/%)

fuzz: $(READY)
	$(BIN)/python -m pip install -q "atheris>=3"
	set -e; for target in $(or $(TARGET),$(FUZZ)); do $(BIN)/python -m tests.fuzz $$target --seconds $(or $(SECONDS),600); done

# The compiled loops under the sanitizers of addresses and undefined behaviour: needs gcc.
SANITIZED := $(VENV)/loops-sanitized.so
sanitize: $(READY)
	gcc -g -O1 -std=c11 -fPIC -shared -pthread -fvisibility=hidden -fsanitize=address,undefined -fno-sanitize-recover=all \
		src/actcache/io/loops.c -o $(SANITIZED)
	ACTCACHE_LOOPS=$(SANITIZED) LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 $(BIN)/python -m pytest -p no:faulthandler -m "not long" tests/io/test_loops.py \
		tests/segments/test_cold_rows.py tests/segments/test_index.py tests/backends tests/fuzz tests/store/test_malicious.py

golden: $(READY)
	$(BIN)/python -m tests.golden.make

# Ray takes 20 s and 240 MB to install, and not every platform has a wheel of it: its tests are skipped there, but in CI.
$(VENV)/.ray: $(READY)
	if $(BIN)/python -m pip install -q -c .ci/constraints.txt ray; then touch $@; \
		else echo "Ray cannot be installed: its tests are skipped"; test -z "$$CI"; fi

test-long: $(READY) $(VENV)/.ray
	$(BIN)/python -m pytest -m "long or hypothesis" --hypothesis-profile long --timeout 7200

# Apart from the others: where torchao is installed, transformers imports it into every process.
test-quantized: $(READY)
	$(BIN)/python -m pip install -q --no-deps -c .ci/constraints.txt --target $(VENV)/quantized torchao bitsandbytes
	PYTHONPATH=$(VENV)/quantized $(BIN)/python -m pytest tests/models/test_quantized.py

# Other people's trainers whose pins disagree: each in an environment of its own over the packages of this one.
# speculators is installed without its dependencies' pins: it asks for torchvision and torchaudio, which it does not need.
CLIENTS := $(VENV)/clients
$(CLIENTS)/%/bin/python: $(READY)
	rm -rf $(CLIENTS)/$* && $(BIN)/python -m venv $(CLIENTS)/$*
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		>$$($@ -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/over.pth

$(CLIENTS)/.sae: $(CLIENTS)/sae/bin/python
	$< -m pip install -q -c .ci/constraints.txt sae-lens==6.54.12 wandb
	$< -m pip install -q --no-deps dictionary-learning==0.1.0 nnsight==0.3.7 diffusers umap-learn circuitsvis llvmlite \
		zstandard python-socketio python-engineio bidict simple-websocket wsproto importlib_metadata zipp
	touch $@

$(CLIENTS)/.speculators: $(CLIENTS)/speculators/bin/python
	$< -m pip install -q --no-deps speculators==0.9.0 hs-connectors==0.9.0 transformers==5.19.0 datasets==5.1.0
	$< -m pip install -q 'loguru<=0.7.3' 'openai>=2' httpx protobuf aiohttp
	touch $@

# gs:// and az:// over real servers (fake-gcs-server comes with a wheel, Azurite from npm), and ranks of torchrun that are
# killed while they read from S3. Two minutes or so; all of it, all of zarr and codecs too, is part of `make test-long`.
AZURITE_VERSION := 3.35.0
AZURITE := $(VENV)/azurite/.$(AZURITE_VERSION)
STORES := (not Zarr or random) and not codecs and not scatter and not columns and not many_kills
$(AZURITE):
	mkdir -p $(@D)
	if npm install --prefix $(@D) --no-audit --no-fund --silent azurite@$(AZURITE_VERSION); then touch $@; \
		else echo "Azurite cannot be installed: az:// is not tested"; fi

test-object-stores: $(READY) $(if $(shell command -v npm),$(AZURITE))
	$(EVERYDAY) tests/segments/objects/test_other_servers.py tests/segments/objects/test_elastic.py -k "$(STORES)$(if $(ACTCACHE_S3_ENDPOINT), and not (elastic and moto))"

LONG := not long
test-clients: $(CLIENTS)/.sae $(CLIENTS)/.speculators
	$(BIN)/python -m pytest tests/models/clients tests/models/test_recipes.py -m "$(LONG)"
	$(CLIENTS)/sae/bin/python -m pytest tests/models/clients/test_sae_lens.py \
		tests/models/clients/test_dictionary_learning.py -m "$(LONG)"
	$(CLIENTS)/speculators/bin/python -m pytest tests/models/clients/test_speculators.py -m "$(LONG)"

test-clients-long:
	$(MAKE) test-clients LONG="long or not long"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# docs/architecture.svg: needs Graphviz.
picture: $(READY)
	set -o pipefail; $(BIN)/import-linter drawgraph actcache | tred | sed 's/helvetica/helvetica, shape=box, style=rounded/' | dot -Tsvg -o docs/architecture.svg

# The documentation site, in build/site; a warning is a failure.
docs: $(READY)
	$(BIN)/python -m pip install -q -c .ci/constraints.txt -e '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/site
	$(BIN)/python -m bench.links build/site

bench: $(READY)
	$(BIN)/python -m bench.storage --shape paper,short --backends hdf5,zarr,lmdb,s3 --mode warm,cold
	$(BIN)/python -m bench.storage --batch 1,8,32,64,256,1024
	$(BIN)/python -m bench.writing --shape paper,short --backends hdf5,zarr,lmdb,s3
	$(BIN)/python -m bench.reading
	$(BIN)/python -m bench.stages
	$(BIN)/python -m bench.segments
	$(BIN)/python -m bench.overlap
	$(BIN)/python -m bench.recycling

clean:
	rm -rf $(VENV) build dist

# What the demo needs and no more; an environment that has all has that, too.
$(DEMO): pyproject.toml .ci/constraints.txt hatch_build.py src/actcache/io/loops.c
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@test $(READY) -nt pyproject.toml || { \
		echo "installing torch (its CPU build), 1 of 2" && \
		$(BIN)/python -m pip install -q "$$(grep '^torch==' .ci/constraints.txt)" && \
		echo "installing actcache, transformers and the model, 2 of 2" && \
		$(BIN)/python -m pip install -q -c .ci/constraints.txt -e '.[demo]'; }
	@touch $(DEMO)

# torch first and alone: see .ci/constraints.txt
$(READY): pyproject.toml .ci/constraints.txt hatch_build.py src/actcache/io/loops.c
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$$(grep '^torch==' .ci/constraints.txt)"
	$(BIN)/python -m pip install -q -c .ci/constraints.txt -e '.[dev]'
	touch $(READY)
