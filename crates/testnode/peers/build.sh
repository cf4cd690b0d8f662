#!/bin/bash
# Builds the peers that no distribution packages, inside a test node: build.sh SOURCE OUT
#
# The compiler is Debian's, installed into the node's overlay, so that the machine needs none.
set -euo pipefail
source=$1 out=$2

export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
apt-get -qq install --yes --no-install-recommends -o Dpkg::Use-Pty=0 golang-go gcc libc6-dev zlib1g-dev

export GOTOOLCHAIN=local GOFLAGS='-mod=readonly -trimpath -buildvcs=false'
module=github.com/containerd/containerd/v2
cd "$source/containerd"
version=$(go list -m -f '{{.Version}}' "$module")
CGO_ENABLED=0 go build -ldflags "-s -w -X $module/version.Version=${version#v}" -o "$out/" \
  "$module/cmd/containerd" "$module/cmd/containerd-shim-runc-v2" "$module/cmd/ctr"

# SOCI inflates with zlib itself, through cgo.
cd "$source/soci15"
CGO_ENABLED=1 go build -ldflags '-s -w' -o "$out/soci15" .

# A client for what a kubelet asks of containerd.
cd "$source/cri"
CGO_ENABLED=0 go build -ldflags '-s -w' -o "$out/cri" .

# The OpenTelemetry collector.
cd "$source/collector"
CGO_ENABLED=0 go build -ldflags '-s -w' -o "$out/collector" .

# containerd's own tests of snapshotters.
cd "$source/suite"
CGO_ENABLED=0 go test -c -o "$out/snapshotter-suite" .
