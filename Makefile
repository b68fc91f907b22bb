# The two that do everything on a fresh machine with Python 3.11+ and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PYTHONUNBUFFERED := 1
# Bytecode is kept, whatever the shell says: without it each process compiles torch anew, for seconds.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: cluster cluster-test image-operator image-trainer-cpu image-trainer-cpu-ipex image-trainer-cuda
.PHONY: help install demo test lint generate verify format lock clean control-plane kill-demo kill-matrix simulate bench-ranks \
        bench-operator bench-beats bench-spot bench-train kill-saves bench-checkpoint \
        bench-learning bench-map

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20

install: ## the virtual environment, from the locks
	@$(PYTHON) tools/install.py $(VENV)

demo: install ## a real FineTuneJob on this machine, no cluster: two ranks, one taken away halfway
	@rm -rf .demo
	$(BIN)/python -m finetune_trainer.demo.circles .demo/data --style squares --num-train 256 --num-validation 16
	$(BIN)/finetune run examples/lora-circles.yaml --home .demo/state --preempt rank=1,at-step=125

# Two at a time, for much of it is waiting. "loadgroup" without groups: whoever is free takes the next test.
test: install ## all tests
	@$(BIN)/python -m testing.realnodes.prepare
	$(BIN)/pytest --numprocesses 2 --dist loadgroup

control-plane: install ## a real API server, scheduler and kwok on loopback, until Ctrl-C; prints its kubeconfig
	@$(BIN)/python -m testing.controlplane

kill-demo: install ## 10 notices and 20 kills at random moments: the weights of the undisturbed run?
	@$(BIN)/python -m tests.chaos.kill_demo

kill-saves: install ## 200 SIGKILLs at random moments, half of them inside a save: does every run end with the same weights?
	@$(BIN)/python -m tests.chaos.kill_saves

bench-checkpoint: install ## how long a save holds training up, beside accelerate's; bytes, and time to durable
	@$(BIN)/python -m bench.checkpoint

bench-ranks: install ## two ranks on two cores beside one rank with two threads
	@$(BIN)/python -m bench.ranks

kill-matrix: install ## every fault at every rank and stage, on real processes: the right end each time? (root)
	@$(BIN)/python -m tests.chaos.kill_matrix

simulate: install ## a million random events against the simulated cluster; a broken invariant prints its replay
	@$(BIN)/python -m tests.simulation --events 1000000

bench-spot: install ## goodput on spot capacity: no operator, upstream practice, this operator
	@$(BIN)/python -m bench.spot

bench-train: install ## images/s and memory of each method beside its floor and a plain loop
	@$(BIN)/python -m bench.train

bench-learning: install ## what each method learns on the circles base: numbers and pictures before and after
	@$(BIN)/python -m bench.learning --out .bench/learning

bench-map: install ## the map phase from 1,000 to 100,000 images: memory, speed, and how long a step waits for its batch
	@$(BIN)/python -m bench.map_phase

cluster-test: install ## real kubelets and containers on this machine (root): faults in mid-training; ARGS='--short'
	@$(BIN)/python -m testing.realnodes $(ARGS)

cluster: install ## real nodes on this machine (root) until Ctrl-C; prints the kubeconfig and what cluster-test asks for
	@$(BIN)/python -m testing.realnodes.up

# Any OCI builder; without docker and podman: buildah, on a base made by debootstrap. VERSION and REVISION go into the labels, BUILD_ARGS to the builder.
BUILDER ?= $(firstword $(foreach name,docker podman,$(shell $(name) info > /dev/null 2>&1 && echo $(name))))
VERSION ?= 0.1.0
REVISION ?= $(shell git rev-parse --short HEAD 2>/dev/null || echo unknown)
REGISTRY ?= ghcr.io/finetune-operator
IMAGE_ARGS = --build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) $(BUILD_ARGS)
define build-image
	$(if $(BUILDER),$(BUILDER) build --file images/$(1).Dockerfile $(IMAGE_ARGS) --tag $(REGISTRY)/$(1):$(VERSION) .,\
		@$(MAKE) -s install && $(BIN)/python -m testing.realnodes.builder $(1) $(IMAGE_ARGS) --tag $(REGISTRY)/$(1):$(VERSION))
endef

image-operator: ## the operator's image, under 150 MiB
	$(call build-image,operator)

image-trainer-cpu: ## the trainer for CPU nodes; BUILD_ARGS='--build-arg TORCH_CPU_INDEX=...' for a small one
	$(call build-image,trainer-cpu)

image-trainer-cpu-ipex: ## the trainer with IPEX and oneCCL; needs BUILD_ARGS='--build-arg ONECCL_INDEX=...'
	$(call build-image,trainer-cpu-ipex)

image-trainer-cuda: ## the trainer for GPUs
	$(call build-image,trainer-cuda)

lint: install ## ruff, mypy strict, import-linter
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench-operator: install ## 1,000 jobs of 4 pods on a real API server, beside a bare loop that creates the same pods
	@$(BIN)/python -m bench.operator

bench-beats: install ## 4,000 supervisors beating over TLS
	@$(BIN)/python -m bench.beats

generate: install ## write the CRD and the reference from the models
	$(BIN)/python tools/generate.py

verify: install ## regenerate what is generated; fail on a difference
	$(BIN)/python tools/generate.py --check

format: install ## put the code into form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: install ## write the locks anew from pyproject.toml
	tools/lock.sh $(BIN)/uv

clean: ## the virtual environment and the demo's state
	rm -rf $(VENV) .demo .bench
