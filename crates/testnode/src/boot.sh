# Run by Node::boot in the node, in namespaces of the machine to be; it becomes the machine's process 1.
# Arguments: where the node has cgroups of version 2.
set -euo pipefail
# A boot finds cgroups as no other has left them.
group=$(mktemp --directory "$1/boot-XXXX")
echo 0 > "$group/cgroup.procs"
# /proc is still the node's, so this is the process id that the node knows this process by.
read -r pid _ < /proc/self/stat

# What is mounted from here on is gone when the machine is; what is on the disk stays.
# shellcheck disable=SC2016  # the shell inside expands it
exec unshare --cgroup bash -euc '
  umount --recursive --lazy /run /tmp /sys
  mount -t tmpfs -o mode=755 tmpfs /run
  mount -t tmpfs -o mode=1777 tmpfs /tmp
  mount -t proc proc /proc
  mount -t sysfs -o ro sysfs /sys
  mount -t cgroup2 cgroup2 /sys/fs/cgroup

  # Settings and devices of the kernel belong to everybody: systemd may look, and changes none.
  mount --bind /proc/sys /proc/sys
  mount -o remount,bind,ro /proc/sys
  # What was written before this boot is told from what was written since by it.
  cat /proc/sys/kernel/random/uuid > /run/testnode-boot-id
  mount --bind /run/testnode-boot-id /proc/sys/kernel/random/boot_id
  mount -o remount,bind,ro /dev
  mount -t tmpfs -o mode=1777 tmpfs /dev/shm
  mount -t devpts -o newinstance,mode=620,ptmxmode=666 devpts /dev/pts
  for device in console kmsg; do mount --bind /dev/null /dev/$device; done
  mkdir -p /run/systemd/journald.conf.d /run/systemd/system
  printf "[Journal]\nReadKMsg=no\n" > /run/systemd/journald.conf.d/testnode.conf

  # What wants devices or a network, and what the node runs itself.
  for unit in getty.target timers.target dev-hugepages.mount dev-mqueue.mount \
      systemd-tmpfiles-setup-dev.service systemd-tmpfiles-setup-dev-early.service \
      nginx.service docker-registry.service; do
    ln -s /dev/null "/run/systemd/system/$unit"
  done

  mount --make-rshared /
  echo "$0"
  # In a container, as it calls this, systemd leaves alone what belongs to the host.
  exec env -i container=testnode PATH="$PATH" /lib/systemd/systemd \
    --unit=multi-user.target --log-target=journal
' "$pid"
