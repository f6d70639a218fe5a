# Read by the scripts beside it: flags, the words of gcloud commands, and running or only showing them.
# Works in bash 3.2 (macOS) as in newer ones. Nothing is remembered between calls: all comes from flags or variables.

NAME=${TPU_NAME:-}
ZONE=${TPU_ZONE:-}
PROJECT=${TPU_PROJECT:-}
SLICES=${TPU_SLICES:-1}
QUEUED=${TPU_QUEUED:-0}
DRY_RUN=0

COMMON_HELP='  --name NAME      of the TPU (or TPU_NAME)
  --zone ZONE      such as us-west4-a (or TPU_ZONE)
  --project ID     Google Cloud project (or TPU_PROJECT; default: gcloud'\''s own)
  --slices N       slices, each of the given type (or TPU_SLICES; default 1)
  --queued         through the queue of requests (or TPU_QUEUED=1; always so with several slices)
  --dry-run        print the commands that would run, and run none'

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# common_flag FLAG VALUE: takes the flag if all scripts share it; SHIFT says how many words it took, 0 if it is another.
common_flag() {
  case $1 in
    --name | --zone | --project | --slices) SHIFT=2 ;;
    --queued | --dry-run) SHIFT=1 ;;
    *) SHIFT=0 ;;
  esac
  [ $# -ge $SHIFT ] || fail "$1 needs a value"
  case $1 in
    --name) NAME=$2 ;;
    --zone) ZONE=$2 ;;
    --project) PROJECT=$2 ;;
    --slices) SLICES=$2 ;;
    --queued) QUEUED=1 ;;
    --dry-run) DRY_RUN=1 ;;
  esac
}

# check_common: what every command needs, and what follows from it.
check_common() {
  [ -n "$NAME" ] || fail "which TPU? give --name or set TPU_NAME"
  [ -n "$ZONE" ] || fail "in which zone? give --zone or set TPU_ZONE"
  case $SLICES in '' | *[!0-9]* | 0*) fail "--slices must be a number from 1, not '$SLICES'" ;; esac
  if [ "$SLICES" -gt 1 ]; then QUEUED=1; fi
  WHERE=(--zone "$ZONE")
  if [ -n "$PROJECT" ]; then WHERE+=(--project "$PROJECT"); fi
  if [ $DRY_RUN = 0 ] && ! command -v gcloud >/dev/null; then
    fail "gcloud is not installed: see https://cloud.google.com/sdk/docs/install, then run: gcloud auth login"
  fi
}

# nodes: the name of each slice's TPU VM, as the queue names them.
nodes() {
  if [ "$SLICES" -gt 1 ]; then
    local i
    for ((i = 0; i < SLICES; i++)); do echo "$NAME-$i"; done
  else
    echo "$NAME"
  fi
}

# quoted WORD...: the words as a shell would have to be given them.
quoted() {
  local word line=
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'$(printf %s "$word" | sed "s/'/'\\\\''/g")'" ;;
    esac
    line="$line${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# run COMMAND...: runs it, or shows it in a dry run.
run() {
  if [ $DRY_RUN = 1 ]; then quoted "$@"; else "$@"; fi
}

# on_workers WORKER COMMAND: one shell command on a worker's number, or on "all", of every slice at the same time.
on_workers() {
  local worker=$1 command=$2 node pids= status=0 pid
  for node in $(nodes); do
    if [ $DRY_RUN = 1 ]; then
      run gcloud compute tpus tpu-vm ssh "$node" "${WHERE[@]}" --worker "$worker" --command "$command"
    else
      gcloud compute tpus tpu-vm ssh "$node" "${WHERE[@]}" --worker "$worker" --command "$command" &
      pids="$pids $!"
    fi
  done
  for pid in $pids; do wait "$pid" || status=$?; done
  return $status
}
