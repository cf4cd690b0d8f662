#!/bin/bash
# Says what of an image its program needs until it first answers: needed.sh LAYOUT TAG PAGE UNPACKED
#
# Without a PAGE it is a database, and its answer is one to a query.
#
# The image's files go into a file system that reads nothing ahead, and the program starts in it: what is in the
# page cache then was touched. UNPACKED is a folder with the files. Prints a JSON object; all are bytes.
set -euo pipefail
layout=$1 tag=$2 page=$3 unpacked=$4
cd /srv
mkdir -p needed/lower needed/upper needed/work needed/root
# Without inline data each file's content is in pages of its own.
mkfs.erofs --quiet -Enoinline_data needed.erofs "$unpacked"
mount -t erofs -o loop,ro needed.erofs needed/lower
echo 0 > "/sys/class/bdi/$(mountpoint -d needed/lower)/read_ahead_kb"
mount -t overlay overlay -o lowerdir=needed/lower,upperdir=needed/upper,workdir=needed/work needed/root
mount -t proc proc needed/root/proc
mount --bind /dev needed/root/dev
config=$(skopeo inspect --config "oci:$layout:$tag")
mapfile -t environment < <(jq -r '.config.Env // [] | .[]' <<< "$config")
mapfile -t program < <(jq -r '.config.Entrypoint[]' <<< "$config")
user=$(jq -r 'if (.config.User // "") == "" then "root" else .config.User end' <<< "$config")
unshare --pid --fork --kill-child chroot --userspec="$user" needed/root env -i "${environment[@]}" "${program[@]}" >&2 &
pid=$!
# The program itself: what becomes another user does not die with its parent.
end() { pkill -KILL --parent "$pid"; }
trap end EXIT
answers() {
  if [ -n "$page" ]; then
    curl --silent --fail --output /dev/null "http://127.0.0.1:8080$page"
  else
    # Not the copy that is looked at.
    chroot "$unpacked" psql --quiet --output /dev/null --host 127.0.0.1 --port 8080 --username postgres -c 'SELECT 1' \
      2> /dev/null
  fi
}
until answers; do
  kill -0 "$pid"
  sleep 0.05
done
touched=$(find needed/lower -xdev -type f -size +0 -print0 | xargs -0 /bench/fincore --bytes --noheadings --output RES |
  awk '$1 > 0 { bytes += $1; files++ } END { printf "%d %d", bytes, files }')
trap - EXIT
end
wait "$pid" 2> /dev/null || true
umount --lazy needed/root/dev needed/root/proc
umount --lazy needed/root
umount --lazy needed/lower
rm -r needed.erofs needed/upper needed/work
gzip=$(skopeo inspect --raw "oci:$layout:$tag" | jq '[.layers[].size] | add')
skopeo inspect --raw "oci:$layout:$tag" | jq -r '.layers[].digest' | sed 's/sha256://' > layers
unpacked=0
while read -r layer; do
  unpacked=$((unpacked + $(zcat "$layout/blobs/sha256/$layer" | wc -c)))
done < layers
jq -n --arg touched "$touched" --argjson gzip "$gzip" --argjson unpacked "$unpacked" \
  '($touched | split(" ") | map(tonumber)) as [$bytes, $files]
   | {touched_bytes: $bytes, touched_files: $files, gzip_bytes: $gzip, unpacked_bytes: $unpacked}'
