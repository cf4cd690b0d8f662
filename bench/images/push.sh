#!/bin/bash
# Pushes the images to a registry, with the indexes that SOCI's own tools make: push.sh HOST USER:PASSWORD OUT
#
# Each system gets repositories of its own, so that none finds the index of another. What needed.sh says of an
# image goes to OUT/needed-IMAGE.json.
set -euo pipefail
host=$1 user=$2 out=$3
declare -A pages=([web]=/en-US/index.html [python]=/ [sklearn]=/ [jvm]=/ [spring]=/ [pytorch]=/ [postgres]=)
cd /srv
# SOCI 0.15 adds what it makes to the layout.
cp -r /bench/layout layout
for image in web python sklearn jvm spring postgres pytorch; do
  for system in overlayfs soci-0.4 hermes; do
    skopeo copy --quiet --preserve-digests "oci:layout:$image" "docker://$host/$system/$image:1"
  done
  # Its tool pushes in plain HTTP.
  /opt/peers/soci15 convert -push "127.0.0.1:5000/soci-0.15/$image:v2" "layout:$image"

  ctr image pull --user "$user" "$host/soci-0.4/$image:1" > /dev/null
  soci create "$host/soci-0.4/$image:1"
  soci push --user "$user" "$host/soci-0.4/$image:1"

  mkdir -p unpacked
  ctr image mount "$host/soci-0.4/$image:1" /srv/unpacked
  bash needed.sh /bench/layout "$image" "${pages[$image]}" /srv/unpacked > "$out/needed-$image.json"
  ctr image unmount --rm /srv/unpacked
done
