# Everything a developer or a CI needs, as verbs. `make` alone lists them.
SHELL       := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

GO       ?= go
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS  := -s -w -X main.version=$(VERSION)
# Packages with unit tests; the end-to-end tests run afterwards and alone, since they time real processes.
UNIT      = $(shell $(GO) list ./... | grep -v -e '/test/e2e' -e '/test/compat')
# A test that has not ended after this is stuck.
TIMEOUT  ?= 15m

.PHONY: help run build test test-all unit e2e race lint fuzz bench bench-build bench-baseline bench-report \
	bench-core bench-queue bench-valkey bench-gateway bench-smoke bench-compare deps clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: build ## build, then start three nodes on this machine (Ctrl-C stops them)
	@bin/tercet dev

build: ## build bin/tercet
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/tercet ./cmd/tercet

deps: ## install what the tests need besides Go, or print the command that does
	@.ci/deps

test: deps unit e2e ## unit tests, a fixed sample of the fault tests, one end-to-end run per client

unit:
	$(GO) test $(TESTFLAGS) -timeout $(TIMEOUT) $(UNIT)

e2e: deps ## end-to-end tests: three real processes, the real clients
	$(GO) test $(TESTFLAGS) -count=1 -timeout $(TIMEOUT) ./test/e2e/... ./test/compat/...

# One package after the other and with -v, so that progress and seeds are seen while a campaign runs.
test-all: export TERCET_TEST_ALL = 1
test-all: TIMEOUT = 12h
test-all: TESTFLAGS = -v -p 1 -count=1
test-all: deps unit e2e ## the long campaigns: full counts of crashes, power losses and lines

race: ## unit tests under the race detector
	CGO_ENABLED=1 $(GO) test -race -timeout 40m $(UNIT)

lint: ## go vet, and golangci-lint at its pinned version
	$(GO) vet ./...
	.ci/lint

fuzz: ## every fuzz target for 10 s each (FUZZTIME=10m for longer)
	.ci/fuzz

bench: build ## publish at full speed to three local nodes, with a disk probe of the same minute
	bin/tercet bench publish --via leader --publishers 256 --size 1024

bench-build: build ## build what the other bench targets run: the baseline, NATS, and the runner of the peers
	cd bench/baseline && CGO_ENABLED=0 $(GO) build -trimpath -o ../../bin/tercet-baseline .
	cd bench/peers && CGO_ENABLED=0 $(GO) build -trimpath -o ../../bin/tercet-peers .
	cd bench/peers && CGO_ENABLED=0 $(GO) build -trimpath -o ../../bin/nats-server github.com/nats-io/nats-server/v2

bench-baseline: bench-build ## the same beside the same engine on hashicorp/raft-wal and the stock transport, in turn
	bin/tercet bench publish --via leader --publishers 256 --size 1024 --baseline --baseline-binary bin/tercet-baseline

bench-report: bench-build ## Tercet beside its peers, into bench/report (40 minutes; FULL=1 for all of it, BENCHFLAGS for more)
	bin/tercet-peers report $(if $(FULL),-full) $(BENCHFLAGS)

bench-core: bench-build ## the goals of the core as a table, into bench/report (10 minutes)
	bin/tercet-peers core $(if $(FULL),-full) $(BENCHFLAGS)

bench-valkey: bench-build ## the goals of the Valkey port against Redis, into bench/report (8 minutes)
	bin/tercet-peers valkey $(if $(FULL),-full) $(BENCHFLAGS)

bench-gateway: bench-build ## what gateway, bridge and pass-through cost beside a real server, into bench/report (6 minutes)
	bin/tercet-peers gateway $(BENCHFLAGS)

bench-queue: bench-build ## the figures of pushes, large messages, keys, delays, groups and topics, into bench/report (6 minutes)
	bin/tercet-peers queue $(if $(FULL),-full) $(BENCHFLAGS)

bench-smoke: bench-build ## a minute of every driver and every peer: do they work?
	cd bench/peers && $(GO) test .
	bin/tercet-peers smoke $(BENCHFLAGS)

bench-compare: ## the Go benchmarks of wal, codec, engine and RESP, here and at BASE=rev, compared by benchstat
	.ci/bench-compare $(BASE)

clean: ## remove what the other targets made, the data of `make run` included
	rm -rf bin dist tercet-data test/e2e/sdk/node_modules
