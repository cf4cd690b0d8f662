# The first process of a node. Arguments: the Debian root, the node's own folder, the number of cgroup
# hierarchies and three words for each, then pairs of what to bind and where.
set -euo pipefail
root=$1 own=$2 n=$3
shift 3
# /proc is still the host's, so this is the process id that the host knows this process by.
read -r pid _ < /proc/self/stat

mount -t overlay overlay -o "lowerdir=$root,upperdir=$own/upper,workdir=$own/work" "$own/merged"
cd "$own/merged"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount --rbind /dev dev
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp

# A snapshotter cannot put its overlays on an overlay, nor watch files there: give it the disk.
for place in var/lib/containerd var/lib/docker-registry var/lib/soci-snapshotter-grpc var/lib/hermes srv; do
  mkdir -p "$place" "$own/disk/$place"
  mount --bind "$own/disk/$place" "$place"
done

# In the new cgroup namespace these mounts show the node's own cgroup as the root.
[ "$n" = 1 ] || mount -t tmpfs -o mode=755 tmpfs sys/fs/cgroup
for ((; n > 0; n--)); do
  mkdir -p ".$1"
  mount -t "$2" ${3:+-o "$3"} "$2" ".$1"
  if [ "$2" = cgroup2 ]; then
    # Version 2 hands controllers only to children of a cgroup without processes of its own.
    mkdir ".$1/init"
    echo 0 > ".$1/init/cgroup.procs"
  fi
  shift 3
done

while [ $# -gt 0 ]; do
  if [ -d "$1" ]; then mkdir -p ".$2"; else mkdir -p ".${2%/*}"; touch ".$2"; fi
  mount --rbind "$1" ".$2"
  shift 2
done

hostname node
echo '127.0.0.1 localhost node reg.test' > etc/hosts
# Not chroot: what enters a container by setns would land in the host's root.
pivot_root . mnt
umount --lazy /mnt
mount --make-rshared /
ip link set lo up

echo "$pid"
# The other end of stdin is held by the test process. When that ends, so does everything here.
exec tini -- cat > /dev/null 2>&1
