#!/bin/bash
# Makes the Debian root that test nodes run on: root.sh FOLDER MIRROR
#
# This file is the whole recipe: the cache is keyed by its content, so any change here makes a new root.
set -euo pipefail
root=$1 mirror=$2

base=ca-certificates,apt,mount,util-linux,iproute2,procps,tini
packages=(
  # container runtimes and registries
  containerd runc crun docker-registry nginx-light soci-snapshotter
  # the first process of a machine that is booted
  systemd
  # making, moving and looking at images
  skopeo umoci erofs-utils busybox-static apache2-utils openssl
  # looking at what went wrong
  curl jq strace
)

# A frozen mirror's Release file may be past its date. Signatures are checked all the same.
frozen='Acquire::Check-Valid-Until "false";'
mmdebstrap --quiet --mode=root --variant=minbase --aptopt="$frozen" --include="$base" forky "$root" "$mirror"
echo "$frozen" > "$root/etc/apt/apt.conf.d/10frozen"
printf '#!/bin/sh\nexit 101\n' > "$root/usr/sbin/policy-rc.d"
chmod +x "$root/usr/sbin/policy-rc.d"
cp --dereference /etc/resolv.conf "$root/etc/resolv.conf"

# Maintainer scripts want /proc. The mount goes with the namespaces.
exec unshare --mount --pid --fork --kill-child --propagation private \
  env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive \
    ${http_proxy:+http_proxy="$http_proxy"} ROOT="$root" MIRROR="$mirror" PACKAGES="${packages[*]}" bash -euc '
  mount -t proc proc "$ROOT/proc"
  cd "$ROOT"
  chroot . apt-get -qq update
  chroot . apt-get -qq install --yes --no-install-recommends -o Dpkg::Use-Pty=0 $PACKAGES

  # Older containerds, beside the packaged one: only the files, under /opt/containerd-DEBIAN.
  for suite in bookworm trixie; do
    echo "deb $MIRROR $suite main" > etc/apt/sources.list.d/older.list
    chroot . apt-get -qq update
    (cd tmp && chroot .. sh -c "cd /tmp && apt-get -qq download -o APT::Sandbox::User=root containerd/$suite")
    chroot . sh -c "dpkg-deb --extract /tmp/containerd_*.deb /opt/containerd-$suite"
    rm tmp/containerd_*.deb etc/apt/sources.list.d/older.list
  done
  chroot . apt-get -qq update
  chroot . apt-get clean
'
