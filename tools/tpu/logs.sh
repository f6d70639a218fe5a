#!/usr/bin/env bash
# The run's output: of the first worker of each slice, or of those asked for.
set -euo pipefail
. "$(dirname "$0")/common.sh"
WORKER=0
LINES=50
FOLLOW=
usage() {
  cat <<HELP
tools/tpu/logs.sh --name NAME --zone ZONE [flags]
$COMMON_HELP
  --worker N|all   default 0, which alone shows progress; the others say what went wrong
  --lines N        default 50
  --follow         go on showing what comes
HELP
}
while [ $# -gt 0 ]; do
  common_flag "$@"
  if [ $SHIFT -gt 0 ]; then shift $SHIFT && continue; fi
  case $1 in
    --worker | --lines) [ $# -gt 1 ] || fail "$1 needs a value" ;;
  esac
  case $1 in
    --worker) WORKER=$2 && shift 2 ;;
    --lines) LINES=$2 && shift 2 ;;
    --follow) FOLLOW=' -f' && shift ;;
    --help | -h) usage && exit ;;
    *) fail "unknown flag $1 (see --help)" ;;
  esac
done
check_common
on_workers "$WORKER" "tail -n $LINES$FOLLOW ~/jaxpost.log"
