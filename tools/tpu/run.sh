#!/usr/bin/env bash
# Starts the same jaxpost command on every worker; it goes on when this terminal closes. logs.sh shows how it is doing.
set -euo pipefail
. "$(dirname "$0")/common.sh"
ENV=(JAXPOST_DISTRIBUTED=auto PYTHONUNBUFFERED=1)
usage() {
  cat <<HELP
tools/tpu/run.sh --name NAME --zone ZONE [flags] -- train configs/sft/PRESET.yaml [settings]
$COMMON_HELP
  --env NAME=VALUE   a variable of the command (HF_TOKEN, WANDB_API_KEY ...); may be given again
HELP
}
while [ $# -gt 0 ]; do
  common_flag "$@"
  if [ $SHIFT -gt 0 ]; then shift $SHIFT && continue; fi
  case $1 in
    --env) [ $# -gt 1 ] || fail "$1 needs a value" && ENV+=("$2") && shift 2 ;;
    --help | -h) usage && exit ;;
    --) shift && break ;;
    *) fail "unknown flag $1 (see --help); the command of jaxpost comes after --" ;;
  esac
done
check_common
[ $# -gt 0 ] || fail "what should run? for example: -- train configs/sft/PRESET.yaml --run.dir '~/shared/{name}'"
# A tilde is the worker's home: it must reach the worker's shell unquoted.
COMMAND=$(quoted "$@" | sed "s#'~/#~/'#g")
on_workers all "cd ~/jaxpost && if [ -e ~/jaxpost.pid ] && kill -0 \$(cat ~/jaxpost.pid) 2>/dev/null; then echo \$(hostname): a run is going on, stop it first >&2; exit 1; fi; { env $(quoted "${ENV[@]}") setsid nohup .venv/bin/jaxpost $COMMAND >> ~/jaxpost.log 2>&1 < /dev/null & echo \$! > ~/jaxpost.pid; }"
