# make demo: from nothing to a robot that moves. make test: everything that is checked. Both set up what they need.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-peers test-gpu gpu-check bench bench-compress bench-engine bench-plan \
	bench-7b bench-metaworld bench-replay bench-robot bench-serving demonstrations train clean
SHELL := /bin/bash
.ONESHELL:
.SHELLFLAGS := -euo pipefail -c

ENV := source tools/env.sh
PYTEST := python -m pytest
ARGS ?=

help: ## this list
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## .venv, ROS 2 where none is sourced, the package in install/; seconds when nothing changed
	@tools/setup.sh

demo: setup ## build the engine, carry out instructions in simulation, record, evaluate: out/demo/report.html
	@# Always on a domain of its own: with a robot's settings the demonstration would command the robot.
	unset ROS_DOMAIN_ID ROS_LOCALHOST_ONLY ROS_AUTOMATIC_DISCOVERY_RANGE ROS_STATIC_PEERS ROS_DISCOVERY_SERVER
	$(ENV)
	ros2 launch vla_edge demo.launch.py $(ARGS)

test: setup ## every test that is not marked slow or gpu
	@$(ENV)
	$(PYTEST) $(ARGS)

test-slow: ## the tests that take minutes, or a browser
	@tools/setup.sh --browser
	$(ENV)
	$(PYTEST) -m "slow and not gpu" $(ARGS)

test-peers: setup ## the tests against other libraries, each installed beside .venv; PEERS="nncf peft" for some
	@tools/test_peers.sh $(PEERS)

test-gpu gpu-check: setup ## the tests that need a CUDA device
	@$(ENV)
	$(PYTEST) -m gpu $(ARGS)

bench: setup ## speed and size of this checkout on this machine: out/bench/core.json
	@$(ENV)
	python -m benchmarks.core $(ARGS)

bench-engine: setup ## engines against PyTorch, LeRobot, llama.cpp and each other, also at SmolVLA-450M's size: out/bench/engine.json
	@$(ENV)
	tools/peer_environment.sh smolvla
	"$$(tools/peer_environment.sh llama_cpp)" -m benchmarks.engine $(ARGS)

bench-compress: setup ## what every recipe costs in radians and successes, ours against other libraries (hours): out/bench/compress.json
	@$(ENV)
	python -m benchmarks.algorithms
	python -m benchmarks.compress $(ARGS)

bench-plan: setup ## how far predictions are off, published latencies and this machine's: out/bench/plan.json
	@$(ENV)
	python -m benchmarks.plan $(ARGS)

bench-7b: setup ## builds within 6 GB at OpenVLA-7B's shapes, killed and resumed (hours, 40 GB of disk): out/bench/7b.json
	@$(ENV)
	"$$(tools/peer_environment.sh llama_cpp)" -m benchmarks.large $(ARGS)

bench-robot: setup ## ticks beside inference at 1 and 2 kHz, a million adversarial chunks: out/bench/robot.json
	@$(ENV)
	python -m benchmarks.robot $(ARGS)

bench-metaworld: setup ## what compression costs in Meta-World: out/bench/metaworld.json
	@$(ENV)
	"$$(tools/peer_environment.sh metaworld)" -m benchmarks.meta_world $(ARGS)

bench-serving: setup ## inference policies in the closed loop with slowed inference: out/bench/robot_serving.json
	@$(ENV)
	python -m benchmarks.robot_serving $(ARGS)

bench-replay: setup ## speed, memory and truth of replays, with an hour of recording (5 GB): out/bench/replay.json
	@$(ENV)
	python -m benchmarks.replay $(ARGS)

demonstrations: setup ## record the expert at the table: out/demonstrations
	@$(ENV)
	python -m vla_edge.sim.demonstrations $(ARGS)

train: setup ## behaviour cloning on out/demonstrations: out/train
	@$(ENV)
	python -m vla_edge.learn.train $(ARGS)

clean: ## remove what was built and written here; .venv and engine bundles stay
	@rm -rf build install log out .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
