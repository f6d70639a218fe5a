#!/usr/bin/env bash
# Makes a Cloud TPU: at once, or through the queue (then it comes when there is room, and spot TPUs are easier to get).
set -euo pipefail
. "$(dirname "$0")/common.sh"
TYPE=${TPU_TYPE:-}
RUNTIME=${TPU_RUNTIME:-}
EXTRA=()
usage() {
  cat <<HELP
tools/tpu/create.sh --name NAME --zone ZONE --type TYPE [flags] [-- more flags for gcloud]
$COMMON_HELP
  --type TYPE      v5litepod-16, v6e-16, v5p-16, v4-16 ... (or TPU_TYPE)
  --runtime NAME   software version (or TPU_RUNTIME; default: by the type)
  --spot           cheaper; may be taken away at any time
  --reserved       from your reservation
HELP
}
while [ $# -gt 0 ]; do
  common_flag "$@"
  if [ $SHIFT -gt 0 ]; then shift $SHIFT && continue; fi
  case $1 in
    --type | --runtime) [ $# -gt 1 ] || fail "$1 needs a value" ;;
  esac
  case $1 in
    --type) TYPE=$2 && shift 2 ;;
    --runtime) RUNTIME=$2 && shift 2 ;;
    --spot | --reserved) EXTRA+=("$1") && shift ;;
    --help | -h) usage && exit ;;
    --) shift && EXTRA+=("$@") && break ;;
    *) fail "unknown flag $1 (see --help)" ;;
  esac
done
check_common
[ -n "$TYPE" ] || fail "which type? give --type or set TPU_TYPE (v5litepod-16, v6e-16 ...)"
if [ -z "$RUNTIME" ]; then
  case $TYPE in
    v5litepod-*) RUNTIME=v2-alpha-tpuv5-lite ;;
    v5p-*) RUNTIME=v2-alpha-tpuv5 ;;
    v6e-*) RUNTIME=v2-alpha-tpuv6e ;;
    v4-*) RUNTIME=tpu-ubuntu2204-base ;;
    *) fail "no software version is known for $TYPE: give --runtime" ;;
  esac
fi
WHAT=("${WHERE[@]}" --accelerator-type "$TYPE" ${RUNTIME:+--runtime-version "$RUNTIME"} ${EXTRA[@]+"${EXTRA[@]}"})
if [ "$QUEUED" = 0 ]; then
  # The direct command calls it --version.
  for i in "${!WHAT[@]}"; do
    if [ "${WHAT[$i]}" = --runtime-version ]; then WHAT[i]=--version; fi
  done
  run gcloud compute tpus tpu-vm create "$NAME" "${WHAT[@]}"
else
  if [ "$SLICES" -gt 1 ]; then
    PLACES=(--node-count "$SLICES" --node-prefix "$NAME")
  else
    PLACES=(--node-id "$NAME")
  fi
  run gcloud compute tpus queued-resources create "$NAME" "${PLACES[@]}" "${WHAT[@]}"
  run gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" --format 'value(state.state)'
fi
