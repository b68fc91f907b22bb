# `make demo` and `make test` do everything on a fresh machine with Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PYTHONUNBUFFERED := 1
# Keep bytecode even if the shell disables it: without it each process compiles torch again, which takes seconds.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: cluster cluster-test image-operator image-trainer-cpu image-trainer-cpu-intel image-trainer-cuda
.PHONY: image-trainer-export readers-environment intel-environment oldest-environment export-environment
.PHONY: help install environments system-packages demo test test-fast test-readers test-intel test-oldest test-export bench-cpu bench-cpu-nodes mutate docs lint generate verify format lock clean control-plane kill-demo hub-faults kill-matrix simulate bench-ranks \
        bench-operator bench-queue test-queue bench-beats bench-spot bench-train kill-saves kill-scripts bench-checkpoint \
        bench-learning bench-map bench-outputs bench-restart bench-exchange bench-launches bench-script-hook gpu-kit

help: ## print this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20

install: ## create the virtual environment from the lock files
	@$(PYTHON) tools/install.py $(VENV)

demo: install ## run a real FineTuneJob on this machine, without a cluster: two ranks, one is preempted halfway
	@rm -rf .demo
	$(BIN)/python -m finetune_trainer.demo.circles .demo/data --style squares --num-train 256 --num-validation 16
	$(BIN)/finetune run examples/local/lora-circles.yaml --home .demo/state --preempt rank=1,at-step=125

system-packages: ## on Debian as root: install what the tests on real nodes need
	@tools/system_packages.sh

# Two workers on two cores, because many tests wait for processes. "loadgroup" gives the next test to a free worker.
test: install system-packages ## run all tests
	@$(BIN)/python -m testing.realnodes.prepare
	$(BIN)/pytest --numprocesses 2 --dist loadgroup

FAST_TESTS := tests/plan tests/api tests/cpu tests/manifests tests/kube tests/tools
test-fast: install ## run the pure tests, in less than a minute
	$(BIN)/pytest --numprocesses 2 -m "not cluster and not trainer" $(FAST_TESTS)

READERS := .venv-readers
test-readers: install readers-environment ## load every output with the oldest and the newest supported releases of diffusers, and compare the pictures
	@$(BIN)/python -m tests.readers --oldest $(READERS)/bin/python

OLDEST := .venv-oldest
test-oldest: oldest-environment ## train every method, and run scripts, with the oldest supported releases of torch, diffusers and accelerate
	@PYTHONPATH=trainer:operator OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest tests/oldest \
	    tests/scripts/test_hook.py::test_a_notice_loses_no_step_and_changes_no_weight

INTEL := .venv-intel
test-intel: intel-environment ## train every method with IPEX on one and two ranks, and sum with oneCCL, in an environment with torch 2.8 and IPEX 2.8
	@PYTHONPATH=trainer:operator $(INTEL)/bin/python -m pytest tests/intel tests/oneccl

EXPORT := .venv-export
test-export: export-environment ## write outputs for OpenVINO, and compare their pictures with those of torch, in an environment with the extra export
	@PYTHONPATH=trainer:operator $(EXPORT)/bin/python -m pytest tests/export

environments: readers-environment intel-environment oldest-environment export-environment ## install the environments of test-readers, test-intel, test-oldest and test-export

readers-environment:
	@$(PYTHON) tools/install.py $(READERS) requirements/readers-oldest.txt

intel-environment:
	@$(PYTHON) tools/install.py $(INTEL) requirements/intel.txt

oldest-environment:
	@$(PYTHON) tools/install.py $(OLDEST) requirements/oldest.txt

export-environment:
	@$(PYTHON) tools/install.py $(EXPORT) requirements/export-tests.txt

bench-cpu: intel-environment ## compare native torch with IPEX, fp32 with bf16, ranks with threads, pinned with unpinned, and bf16 on the wire
	@PYTHONPATH=trainer:operator $(INTEL)/bin/python -m bench.cpu $(ARGS)

bench-cpu-nodes: install ## as root: a small reference job on four network namespaces; scaling beside torchrun with DDP
	@$(BIN)/python -m bench.cpu_nodes $(ARGS)

test-stores: install ## deliver outputs to stand-ins for Google's and Azure's object stores, built with Go and npm
	@$(BIN)/python -m testing.objectstore.stand_ins
	@FINETUNE_STORES=1 $(BIN)/pytest tests/trainer/delivery/test_other_stores.py

mutate: install ## remove one policy, cause or rule at a time; do the tests notice each removal?
	@$(BIN)/python -m tools.mutate $(ARGS)

docs: install ## build the documentation site into site/; broken links are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

control-plane: install ## run a real API server, scheduler and kwok on loopback until Ctrl-C; prints the kubeconfig
	@$(BIN)/python -m testing.controlplane

kill-demo: install ## 10 preemption notices and 20 kills at random times; compares the weights with an undisturbed run
	@$(BIN)/python -m tests.chaos.kill_demo

hub-faults: install ## 50 jobs with preemptions against a hub that fails at random; compares the weights
	@$(BIN)/python -m tests.chaos.hub_faults

kill-saves: install ## 200 SIGKILLs at random times, half of them during a save; compares the final weights
	@$(BIN)/python -m tests.chaos.kill_saves

kill-scripts: install ## 25 preemption notices and 25 SIGKILLs of an unmodified script on 2 ranks; compares the weights
	@$(BIN)/python -m tests.chaos.kill_scripts

bench-script-hook: install ## measure what the hook of scripts adds to a step, as a share of 50 ms
	@$(BIN)/python -m bench.script_hook

bench-checkpoint: install ## measure how long a save stalls training, compared with accelerate; bytes and time to durable
	@$(BIN)/python -m bench.checkpoint

bench-upload: install ## deliver an output to an S3 server on the loopback, beside a plain copy of the same bytes
	@$(BIN)/python -m bench.upload $(ARGS)

bench-ranks: install ## compare two ranks on two cores with one rank of two threads
	@$(BIN)/python -m bench.ranks

kill-matrix: install ## inject every fault at every rank and stage of real processes and check the result (root)
	@$(BIN)/python -m tests.chaos.kill_matrix

simulate: install ## run a million random events on the simulated cluster; a broken invariant prints how to replay it
	@$(BIN)/python -m tests.simulation --events 1000000

bench-exchange: install ## as root: measure how much of the gradient exchange the backward pass hides, on limited links
	@$(BIN)/python -m bench.exchange $(ARGS)

bench-launches: install ## count the operations that a training step of each method dispatches, without a GPU
	@$(BIN)/python -m bench.launches

bench-spot: install ## compare goodput on spot capacity: no operator, upstream practice, this operator
	@$(BIN)/python -m bench.spot

bench-train: install ## measure images/s and memory of each method, compared with its floor and a plain loop
	@$(BIN)/python -m bench.train

gpu-kit: install ## make gpu-kit/, a folder that measures everything on a machine with a GPU and without a network
	@$(BIN)/python -m tools.gpu_kit $(ARGS)

bench-learning: install ## measure what each method learns on the circles base: numbers and pictures before and after
	@$(BIN)/python -m bench.learning --out .bench/learning

bench-restart: install ## measure the time from the kill of a rank to its next new step, by phase
	@$(BIN)/python -m bench.restart

bench-outputs: install ## measure seconds and peak memory of each output format, beside a plain copy; needs 14 GB of disk
	@$(BIN)/python -m bench.outputs $(ARGS)

bench-map: install ## measure the map phase from 1,000 to 100,000 images: memory, speed, wait per step
	@$(BIN)/python -m bench.map_phase

cluster-test: install ## inject faults during training on real kubelets and containers (root); ARGS='--short'
	@$(BIN)/python -m testing.realnodes $(ARGS)

cluster: install ## run real nodes on this machine (root) until Ctrl-C; prints the kubeconfig and the variables of cluster-test
	@$(BIN)/python -m testing.realnodes.up

# Any OCI builder works. Without docker and podman: buildah, on a base built by debootstrap. VERSION and REVISION go into
# the image labels, BUILD_ARGS to the builder.
BUILDER ?= $(firstword $(foreach name,docker podman,$(shell $(name) info > /dev/null 2>&1 && echo $(name))))
VERSION ?= $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' trainer/finetune_contract/__init__.py)
REVISION ?= $(shell git rev-parse --short HEAD 2>/dev/null || echo unknown)
REGISTRY ?= ghcr.io/finetune-operator
IMAGE_ARGS = --build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) $(BUILD_ARGS)
define build-image
	$(if $(BUILDER),$(BUILDER) build --file images/$(1).Dockerfile $(IMAGE_ARGS) --tag $(REGISTRY)/$(1):$(VERSION) .,\
		@$(MAKE) -s install && $(BIN)/python -m testing.realnodes.builder $(1) $(IMAGE_ARGS) --tag $(REGISTRY)/$(1):$(VERSION))
endef

image-operator: ## build the operator image, under 150 MiB
	$(call build-image,operator)

image-trainer-cpu: ## build the trainer image for CPU nodes; BUILD_ARGS='--build-arg TORCH_CPU_INDEX=...' makes it small
	$(call build-image,trainer-cpu)

image-trainer-cpu-intel: ## build the trainer image with IPEX and oneCCL; needs BUILD_ARGS='--build-arg ONECCL_INDEX=...'
	$(call build-image,trainer-cpu-intel)

image-trainer-export: ## build the image of export pods; BUILD_ARGS as for image-trainer-cpu
	$(call build-image,trainer-export)

image-trainer-cuda: ## build the trainer image for GPUs
	$(call build-image,trainer-cuda)

lint: install ## run ruff, mypy --strict and import-linter
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench-operator: install ## run 1,000 jobs of 4 pods on a real API server, compared with a bare loop that creates the same pods
	@$(BIN)/python -m bench.operator $(ARGS)

bench-queue: install ## run 200 jobs in three queues of Kueue's real controller, with preemptions, vanishing nodes and shrinking quotas
	@$(BIN)/python -m bench.queue $(ARGS)

test-queue: install ## test jobs with queues on a real API server with Kueue's real controller; the first build takes about ten minutes
	@FINETUNE_KUEUE=1 $(BIN)/python -m pytest tests/queues

bench-beats: install ## send heartbeats of 4,000 supervisors over TLS
	@$(BIN)/python -m bench.beats

generate: install ## write the generated files: CRD, reference, version stamps
	$(BIN)/python tools/generate.py

verify: install ## regenerate the generated files; fail on a difference
	$(BIN)/python tools/generate.py --check

format: install ## format the code and apply safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: install ## rewrite the lock files from pyproject.toml
	tools/lock.sh $(BIN)/uv

clean: ## remove the virtual environment, the demo state and built docs
	rm -rf $(VENV) $(READERS) $(INTEL) .demo .bench site gpu-kit gpu-kit-results
