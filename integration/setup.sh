#!/usr/bin/env bash
# Installs what a make target needs and is not there yet, and says so:
#   integration/setup.sh go|demo|test|bench
# Debian 12 and Ubuntu are known; elsewhere it lists what to install by hand.
# Where Go comes from another place than PATH, .go is linked to it, which the
# Makefile puts in front of PATH.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

updated=
apt_update() { # ADVICE
	[ -z "$updated" ] || return 0
	command -v apt-get >/dev/null || die "this is not Debian or Ubuntu; install by hand, then try again: $1"
	[ "$(id -u)" = 0 ] || die "to be installed: $1. Run make as root, or install by hand and try again"
	apt-get -qq update </dev/null || die "apt-get update failed; install by hand, then try again: $1"
	updated=yes
}

apt_install() {
	apt_update "$*"
	say "installing $* with apt-get"
	DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$@" </dev/null >/dev/null ||
		die "apt-get could not install $*; its messages are above"
}

# packages COMMAND=PACKAGE...: install the packages whose command is missing.
packages() {
	local missing=() pair
	for pair in "$@"; do
		command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
	done
	if [ ${#missing[@]} -gt 0 ]; then
		# shellcheck disable=SC2046 # package names hold no blanks
		apt_install $(printf '%s\n' "${missing[@]}" | sort -u)
	fi
}

# minor GO: the N of the program's version 1.N; 0 when there is none. Asked in /
# and without a toolchain switch: this module's go line may be too new for it.
minor() {
	local v
	v=$(cd / && GOTOOLCHAIN=local "$1" env GOVERSION 2>/dev/null) || v=
	v=${v#go1.}
	v=${v%%[!0-9]*}
	echo "${v:-0}"
}

# newest_go: the newest Go among the usual places; sudo drops most from PATH.
newest_go() {
	local best='' best_minor=0 go m
	for go in .go/bin/go "$(command -v go || true)" /usr/local/go/bin/go /usr/lib/go-1.*/bin/go /snap/bin/go; do
		[ -x "$go" ] || continue
		m=$(minor "$go")
		if [ "$m" -gt "$best_minor" ]; then best=$go best_minor=$m; fi
	done
	echo "$best"
}

use_go() { # GO: link .go to the tree that it belongs to
	local root
	root=$(cd / && GOTOOLCHAIN=local "$1" env GOROOT)
	if [ "$(readlink -f .go || true)" != "$(readlink -f "$root")" ]; then
		ln -sfn "$root" .go
	fi
}

# fetch_go GO: a Go too old to fetch newer ones by itself can still fetch one as
# what it is, a module, checked against the checksum database like any other.
# The module system drops the executable bits and keeps go.mod as _go.mod.
fetch_go() {
	local version said dir module
	version=$(sed -n 's/^go //p' go.mod)
	module="golang.org/toolchain@v0.0.1-go$version.linux-$(cd / && "$1" env GOARCH)"
	say "fetching Go $version through the Go module proxy"
	said=$(cd / && "$1" mod download -json "$module") || true
	dir=$(sed -n 's/.*"Dir": "\(.*\)".*/\1/p' <<<"$said")
	[ -d "$dir" ] || die "could not fetch $module: $said
Install Go $version or newer by hand into /usr/local/go and try again"
	rm -rf .go
	cp -R "$dir" .go
	chmod -R u+w .go
	chmod +x .go/bin/* .go/pkg/tool/*/*
	find .go -name _go.mod -execdir mv {} go.mod ';'
}

setup_go() {
	local want go newest n
	want=$(sed -n 's/^go 1\.\([0-9]*\).*/\1/p' go.mod)
	go=$(newest_go)
	if [ -z "$go" ] || [ "$(minor "$go")" -lt 21 ]; then
		# From 1.21 on, Go fetches the version that go.mod names by itself.
		apt_update "Go 1.$want or newer"
		newest=$(apt-cache search --names-only '^golang-1\.[0-9]+-go$' | awk '{print $1}' | sort -V | tail -n 1)
		n=${newest#golang-1.} n=${n%-go}
		if [ -z "$go" ] || [ "${n:-0}" -ge 21 ]; then
			apt_install ca-certificates "${newest:-golang-go}"
		fi
		go=$(newest_go)
	fi
	[ -n "$go" ] || die "no Go to be found; install Go 1.$want or newer into /usr/local/go and try again"
	if [ "$(minor "$go")" -lt 21 ]; then
		fetch_go "$go"
	elif [ "$go" != "$(command -v go || true)" ]; then
		use_go "$go"
	fi
	PATH="$PWD/.go/bin:$PATH"
	GOTOOLCHAIN=auto go version >/dev/null ||
		die "Go 1.$(minor "$(command -v go)") could not fetch the version that go.mod asks for. Install Go 1.$want or newer into /usr/local/go and try again"
}

setup_go
case "${1:-go}" in
go | demo) ;; # the demo uses no other program than its own
bench) packages iptables-nft=iptables ;;
test) packages nft=nftables iptables-nft=iptables iptables-legacy=iptables ip=iproute2 haproxy=haproxy strace=strace ;;
*) die "usage: integration/setup.sh go|demo|test|bench" ;;
esac
