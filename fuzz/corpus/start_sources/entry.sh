#!/bin/sh
set -eu
# where it is
home=$(cd "$(dirname "$0")/.." && pwd)
: "${SETTINGS:=${HOME:-/home}/settings}"
export PATH="$home/bin":$PATH
if [ "$(id -u)" = '0' ]; then
  chown -R app "$SETTINGS" > /dev/null 2>&1 || true
fi
. ${0%/*}/env.sh
case "$1" in
  serve|run) shift; exec java -cp "$home/lib/*:`ls $home`" Main\ Class "$@" ;;
  *) exec "$@" $2 ;;
esac
