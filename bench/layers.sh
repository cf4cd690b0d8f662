#!/bin/bash
# Makes the layers that the local benchmarks measure, out of Debian's packages: layers.sh FOLDER MIRROR
#
#   base, python, libraries   an image of three layers: Debian, Python, and what programs import
#   large                     one layer of more than 1 GB compressed
#   huge                      one layer of more than 5 GB uncompressed
#
# This file is the whole recipe: the cache is keyed by its content, so any change here makes new ones.
set -euo pipefail
out=$1 mirror=$2 root=$1/root

libraries=(python3-numpy python3-pandas python3-scipy python3-sklearn python3-matplotlib python3-sympy
  python3-django python3-sqlalchemy)
more=(chromium llvm clang rustc openjdk-25-jdk-headless)

# Packs paths of the root, named on standard input with a NUL behind each, as a layer.
pack() {
  LC_ALL=C sort -z | tar -C "$root" --create --format=gnu --numeric-owner --null --no-recursion --files-from=- |
    gzip -6 --no-name > "$out/$1.tar.gz"
}
# What was made or changed since the last layer.
changes() {
  (cd "$root" && find . -xdev -mindepth 1 -newerct "@$since" \
    -not -path './proc/*' -not -path './tmp/*' -not -path './var/cache/*' -not -path './var/lib/apt/*' -print0)
}
install() {
  since=$(date +%s.%N)
  unshare --mount --pid --fork --kill-child --propagation private \
    env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive \
      ${http_proxy:+http_proxy="$http_proxy"} bash -euc '
    mount -t proc proc "$0/proc"
    chroot "$0" apt-get -qq install --yes --no-install-recommends -o Dpkg::Use-Pty=0 "$@"
    chroot "$0" apt-get clean
  ' "$root" "$@"
}

since=0
# A frozen mirror's Release file may be past its date. Signatures are checked all the same.
frozen='Acquire::Check-Valid-Until "false";'
mmdebstrap --quiet --mode=root --variant=minbase --aptopt="$frozen" --include=ca-certificates,apt \
  forky "$root" "$mirror"
changes | pack base

echo "$frozen" > "$root/etc/apt/apt.conf.d/10frozen"
printf '#!/bin/sh\nexit 101\n' > "$root/usr/sbin/policy-rc.d"
chmod +x "$root/usr/sbin/policy-rc.d"
cp --dereference /etc/resolv.conf "$root/etc/resolv.conf"
chroot "$root" apt-get -qq update

install python3
changes | pack python

install "${libraries[@]}"
mkdir "$root/bench"
# The names of 500 modules that can be imported one after the other.
cat > "$root/bench/choose.py" <<'END'
import importlib, os, pkgutil, sys, warnings
warnings.simplefilter("ignore")
unwanted = ("antigravity", "this", "idlelib", "turtledemo", "lib2to3", "tkinter", "turtle", "test", "tests",
            "conftest", "__main__", "setup", "_pytest", "pip", "ensurepip", "testing", "f2py", "distutils")
heavy = ["numpy", "pandas", "scipy.sparse", "scipy.stats", "scipy.optimize", "sklearn.linear_model",
         "sklearn.ensemble", "sympy", "django", "sqlalchemy", "json", "asyncio"]
found, output = [], os.dup(1)
os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
packages = ["asyncio", "concurrent", "ctypes", "dbm", "email", "encodings", "html", "http", "importlib", "json",
            "logging", "multiprocessing", "sqlite3", "unittest", "urllib", "wsgiref", "xml", "xmlrpc", "zoneinfo"]
walk = [m.name for m in pkgutil.iter_modules() if m.name in sys.stdlib_module_names]
for package in packages:
    path = importlib.import_module(package).__path__
    walk += [m.name for m in pkgutil.walk_packages(path, package + ".", onerror=lambda name: None)]
for package in ["sqlalchemy", "django.db", "django.http", "sympy", "sklearn", "scipy", "pandas"]:
    path = importlib.import_module(package).__path__
    walk += [m.name for m in pkgutil.walk_packages(path, package + ".", onerror=lambda name: None)]
for name in heavy + walk:
    if len(found) == 500:
        break
    if name in found or set(name.split(".")) & set(unwanted):
        continue
    try:
        importlib.import_module(name)
    except BaseException:
        continue
    found.append(name)
os.write(output, "".join(name + "\n" for name in found).encode())
END
chroot "$root" python3 -B /bench/choose.py > "$root/bench/modules"
[ "$(wc -l < "$root/bench/modules")" = 500 ]
changes | pack libraries

install "${more[@]}"
everything() { (cd "$root" && since=0 && changes); }
everything | pack large

# All of it, and what is largest in it a second time.
mkdir "$root/second"
unshare --mount --propagation private bash -euc '
  mount --bind "$0/usr/lib" "$0/second"
  cd "$0"
  find . -xdev -mindepth 1 -not -path "./proc/*" -print0 | LC_ALL=C sort -z |
    tar --create --format=gnu --numeric-owner --hard-dereference --null --no-recursion --files-from=- | gzip -1 --no-name
' "$root" > "$out/huge.tar.gz"
rm -rf --one-file-system "$root"
