#!/usr/bin/env bash
# Asks the run to stop: it saves a checkpoint and ends. The same command with run.sh goes on from there.
set -euo pipefail
. "$(dirname "$0")/common.sh"
usage() {
  cat <<HELP
tools/tpu/stop.sh --name NAME --zone ZONE [flags]
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
on_workers all "[ -e ~/jaxpost.pid ] && kill -TERM \$(cat ~/jaxpost.pid) && while kill -0 \$(cat ~/jaxpost.pid) 2>/dev/null; do sleep 1; done; tail -n 3 ~/jaxpost.log"
