#!/usr/bin/env bash
# Deletes the TPU, and its request if it came through the queue. What is in mounted storage stays; its disks do not.
set -euo pipefail
. "$(dirname "$0")/common.sh"
usage() {
  cat <<HELP
tools/tpu/delete.sh --name NAME --zone ZONE [flags]
$COMMON_HELP
HELP
}
while [ $# -gt 0 ]; do
  common_flag "$@"
  if [ $SHIFT -gt 0 ]; then shift $SHIFT && continue; fi
  case $1 in
    --help | -h) usage && exit ;;
    *) fail "unknown flag $1 (see --help)" ;;
  esac
done
check_common
if [ "$QUEUED" = 0 ]; then
  run gcloud compute tpus tpu-vm delete "$NAME" "${WHERE[@]}" --quiet
else
  run gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet
fi
