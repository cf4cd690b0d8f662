# Run by Node::start as `bash -c`: moves itself into the node's cgroups and makes its namespaces.
# Arguments: the script that runs inside, which namespaces to make, the number of cgroups, the cgroups;
# the rest is for the script inside.
set -euo pipefail
inside=$1 namespaces=$2 n=$3
shift 3
for ((; n > 0; n--)); do
  echo $$ > "$1/cgroup.procs"
  shift
done
# shellcheck disable=SC2086  # a list of flags
exec unshare $namespaces --fork --kill-child=KILL --propagation private bash -c "$inside" node "$@"
