# `make` alone lists the targets. Those that make network namespaces (demo,
# test, bench) need root; each sets up what it needs first.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help build demo test bench lint fuzz clean tools root

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
FUZZTIME ?= 10s

export PATH := $(CURDIR)/.go/bin:$(PATH):/usr/local/go/bin:/usr/sbin:/sbin
export GOTOOLCHAIN := auto
export CGO_ENABLED := 0
# Under sudo git may not want to read the checkout, and then go would not build.
export GOFLAGS := $(GOFLAGS) -buildvcs=false

GOBUILD = go build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o bin/
CNI_PLUGINS = github.com/containernetworking/plugins/plugins

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

build: ## build bin/preroute, static, for this machine's architecture
	@integration/setup.sh go
	$(GOBUILD)preroute ./plugin

demo: root ## show the main job on real traffic in two network namespaces
	@integration/setup.sh demo
	@[ -x bin/demo ] || echo "building; the first time takes a minute or two" >&2
	@$(MAKE) --no-print-directory -s tools
	@bin/demo -bin bin

test: root ## run every test, in real network namespaces
	@integration/setup.sh test
	go test -count=1 -timeout 30m -json ./... | go run ./integration/tally

bench: root ## measure against a bare CNI plugin, iptables and no redirect (BENCHFLAGS=--quick)
	@integration/setup.sh bench
	@$(MAKE) --no-print-directory -s tools
	@bin/bench -bin bin $(BENCHFLAGS)

lint: ## gofmt, go mod tidy, go vet, staticcheck
	@integration/setup.sh go
	@files=$$(gofmt -l $$(go list -f '{{.Dir}}' ./...)); [ -z "$$files" ] || { printf 'gofmt -w these:\n%s\n' "$$files" >&2; exit 1; }
	go mod tidy -diff
	go vet ./...
	go tool staticcheck ./...

fuzz: ## fuzz every parser for FUZZTIME (10s) each
	@integration/setup.sh go
	@for pkg in $$(go list ./...); do \
		for f in $$(go test -list '^Fuzz' "$$pkg" | grep '^Fuzz' || true); do \
			echo "fuzzing $$pkg $$f for $(FUZZTIME)"; \
			go test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) "$$pkg"; \
		done; \
	done

clean: ## remove what was built
	rm -rf bin

# What the demo and the benchmarks run beside the product.
tools: build
	$(GOBUILD) ./integration/demo ./integration/bench ./integration/sidecar ./integration/skeleton \
		$(CNI_PLUGINS)/ipam/host-local $(CNI_PLUGINS)/main/ptp

root:
	@[ "$$(id -u)" = 0 ] || { echo "make $(MAKECMDGOALS): making network namespaces needs root; run: sudo make $(MAKECMDGOALS)" >&2; exit 1; }
