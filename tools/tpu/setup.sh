#!/usr/bin/env bash
# Installs the last commit of this checkout on every worker, and mounts shared storage for runs.
set -euo pipefail
. "$(dirname "$0")/common.sh"
STORAGE=()
usage() {
  cat <<HELP
tools/tpu/setup.sh --name NAME --zone ZONE [flags]
$COMMON_HELP
  --nfs HOST:/PATH   mount this share (Filestore) at ~/shared on every worker
  --bucket BUCKET    mount this Cloud Storage bucket at ~/shared on every worker (gcsfuse)
HELP
}
while [ $# -gt 0 ]; do
  common_flag "$@"
  if [ $SHIFT -gt 0 ]; then shift $SHIFT && continue; fi
  case $1 in
    --nfs | --bucket) [ $# -gt 1 ] || fail "$1 needs a value" && STORAGE=("${1#--}" "$2") && shift 2 ;;
    --help | -h) usage && exit ;;
    *) fail "unknown flag $1 (see --help)" ;;
  esac
done
check_common
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
cd "$ROOT"
if [ -n "$(git status --porcelain)" ]; then
  echo "setup.sh: changes that are not committed stay behind; workers get $(git rev-parse --short HEAD)" >&2
fi
ARCHIVE=${TMPDIR:-/tmp}/jaxpost.tar.gz
run git archive --format tar.gz --output "$ARCHIVE" HEAD
for node in $(nodes); do
  run gcloud compute tpus tpu-vm scp "$ARCHIVE" "$node:jaxpost.tar.gz" "${WHERE[@]}" --worker all
done
on_workers all "mkdir -p ~/jaxpost && tar -xzf ~/jaxpost.tar.gz -C ~/jaxpost && bash ~/jaxpost/tools/tpu/worker.sh $(quoted ${STORAGE[@]+"${STORAGE[@]}"})"
