#!/usr/bin/env bash
# Runs one command on every worker of a Cloud TPU slice, and again after each preemption.
#
#   launch/tpu_pod.sh NAME ZONE TYPE [options] -- VERB ARGS...
#   launch/tpu_pod.sh pod us-central2-b v4-64 --spot -- train --config=configs/wmt14_ende.py --workdir=gs://bucket/run
#
# Uses the TPU VM called NAME, or creates it with accelerator type TYPE; installs this commit on every worker;
# starts `janus-jax VERB ARGS... --distributed` there and shows the log of worker 0.  VERB is train or evaluate.
# What is not committed is not sent.  The log of each worker is its ~/janus_jax/runs/RUN/log.
# The run outlives a lost connection: the same command line follows it again.  SIGTERM and Ctrl-C save and stop it.
#
#   --queued            ask for a new TPU through a queued resource, also called NAME, and wait for it
#   --spot              a new TPU may be preempted, and costs less
#   --version=RUNTIME   software of a new TPU VM (default: that of the TYPE)
#   --project=PROJECT   (default: that of gcloud)
#   --run=RUN           name of the run on the workers (default run)
#   --extras=LIST       extras of the package to install (default tpu)
#   --grace=S           seconds that the other workers get to end after worker 0, before SIGKILL (default 300)
#   --restarts=N        start again, on a new TPU if need be, up to N times (default 20)
#   --delete            delete the TPU at the end, however the run ended
#   --dry-run           print the commands and run none; COMMIT stands for the short hash of HEAD,
#                       DIR for a temporary folder
#
# Exit code: that of the command; 75 if it stopped and saved more often than --restarts, or on request, so that
# starting again goes on; 1 if there is no TPU to be had; 2 for a wrong command line.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

[[ ${1:-} =~ ^(-h|--help)$ ]] && { usage; exit 0; }
[ $# -ge 3 ] || { usage >&2; exit 2; }
[[ $1 =~ ^[a-z][a-z0-9-]*$ ]] || misused "NAME must be lower-case letters, digits and hyphens, got '$1'"
[[ $2 =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || misused "ZONE must be like us-central2-b, got '$2'"
[[ $3 =~ ^v[a-z0-9]+-[0-9]+$ ]] || misused "TYPE must be like v4-64, got '$3'"
name=$1 zone=$2 type=$3
queued=false spot=() runtime='' project=() run_name=run extras=tpu grace=300 restarts=20 delete_after=false
shift 3
while [ $# -gt 0 ]; do
  case $1 in
    --queued) queued=true ;;
    --spot) spot=(--spot) ;;
    --version=*) runtime=${1#*=} ;;
    --project=*) project=("$1") ;;
    --run=*) run_name=${1#*=} ;;
    --extras=*) extras=${1#*=} ;;
    --grace=*) grace=${1#*=}; whole --grace "$grace" 0 ;;
    --restarts=*) restarts=${1#*=}; whole --restarts "$restarts" 0 ;;
    --delete) delete_after=true ;;
    --dry-run) dry_run=true ;;
    --) shift; break ;;
    *) misused "unknown option '$1'" ;;
  esac
  shift
done
check_verb "$@"
[[ $run_name =~ ^[A-Za-z0-9_.-]+$ ]] || misused "--run must be letters, digits and _ . -, got '$run_name'"
[[ $extras =~ ^[a-z0-9,_-]+$ ]] || misused "--extras must be names separated by commas, got '$extras'"
case ${runtime:+given}$type in
  given*) ;;
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  *) runtime=tpu-ubuntu2204-base ;;
esac

cd "$(dirname "$0")/.." # what is sent is this repository
vm=(gcloud compute tpus tpu-vm) queue=(gcloud compute tpus queued-resources)
where=(--zone="$zone" "${project[@]}")
pause=${JANUS_JAX_PAUSE:-15} # seconds between two looks at a TPU that is not ready
stopped=false started=false creations=0 commit=COMMIT archives=DIR

# -- the TPU --------------------------------------------------------------------------------------

# state_of FORMAT DESCRIBE...: what gcloud says; NONE if there is no such thing, UNREACHABLE if it cannot tell.
state_of() {
  local answer
  if answer=$("${@:2}" describe "$name" "${where[@]}" --format="$1" 2>&1); then
    echo "${answer##*$'\n'}"
  elif [[ $answer == *NOT_FOUND* ]]; then
    echo NONE
  else
    echo "$answer" >&2
    echo UNREACHABLE
  fi
}

state() {
  local now
  now=$(state_of 'value(state)' "${vm[@]}")
  if [ "$now" = NONE ] && $queued; then now=$(state_of 'value(state.state)' "${queue[@]}"); fi
  echo "$now"
}

create() {
  if $queued; then
    run "${queue[@]}" create "$name" --node-id="$name" "${where[@]}" \
      --accelerator-type="$type" --runtime-version="$runtime" "${spot[@]}"
  else
    run "${vm[@]}" create "$name" "${where[@]}" --accelerator-type="$type" --version="$runtime" "${spot[@]}"
  fi
}

delete() {
  if $queued; then
    run "${queue[@]}" delete "$name" "${where[@]}" --force --quiet
  else
    run "${vm[@]}" delete "$name" "${where[@]}" --quiet
  fi
}

ensure() { # returns once the TPU is ready
  local now before='' unreachable=0
  while now=$(state) && [ "$now" != READY ]; do
    [ "$now" = "$before" ] || say "$name: $now"
    before=$now
    case $now in
      NONE)
        ((creations++ <= restarts)) || end 1 "no TPU to be had, after $restarts restarts"
        # The first may fail for a reason that stays; later ones, most likely, for want of a free TPU.
        create || ((creations > 1)) || end 1 "the TPU could not be created"
        ;;
      PREEMPTED | TERMINATED | FAILED | SUSPENDED) delete || say "not deleted yet" ;; # these never come back
      STOPPED | HIDDEN | UNKNOWN) end 1 "$name is $now: start or delete it" ;;
      UNREACHABLE) ((++unreachable <= 20)) || end 1 "gcloud cannot tell the state of $name" ;;
    esac
    sleep "$pause"
    ! $stopped || end 75 "stopped on request before the run started"
  done
}

# -- the run --------------------------------------------------------------------------------------

remote() { # remote WORKER COMMAND; the keep-alive ends a connection to a worker that is gone
  run "${vm[@]}" ssh "$name" "${where[@]}" --worker="$1" --ssh-flag=-oServerAliveInterval=30 --command="$2"
}

worker() { # worker WHICH ACTION ARGS...: what tpu_worker.sh is to do there
  remote "$1" "bash janus_jax/$commit/launch/tpu_worker.sh $(quoted "${@:2}")"
}

send() { # this commit, to all workers
  local file=janus_jax-$commit.tar.gz
  run git archive --output="$archives/$file" HEAD &&
    run "${vm[@]}" scp "$archives/$file" "$name": "${where[@]}" --worker=all &&
    remote all "mkdir -p janus_jax/$commit && tar -xzf $file -C janus_jax/$commit" &&
    worker all install "$extras"
}

follow() { # the log of worker 0 until the run ends there; in the background, so that a signal is heard at once
  local lines=+1 follower code lost=0
  while :; do
    worker 0 follow "$run_name" "$lines" &
    follower=$! code=0
    while kill -0 $follower 2>/dev/null; do wait $follower && code=0 || code=$?; done
    if $dry_run || [ $code = 0 ]; then return; fi
    if ((++lost > 10)) || [ "$(state)" != READY ]; then return; fi
    say "lost the connection to worker 0: trying again"
    lines=20
    sleep "$pause"
  done
}

attempt() { # one start of the command to its end; sets `code`, to nothing if it is not known
  local answer
  code=
  send || return 0
  started=true
  worker all start "$run_name" "$@" --distributed || return 0
  if $stopped; then on_signal; fi # it came while they were starting
  follow
  if $dry_run; then
    worker all result "$run_name" "$grace"
  elif answer=$(worker all result "$run_name" "$grace"); then
    echo "$answer"
    # shellcheck disable=SC2046  # one word for each worker
    code=$(verdict $(sed -n 's/.* ended with exit code \([0-9]*\)$/\1/p' <<<"$answer"))
  fi
  started=false
}

on_signal() {
  stopped=true
  if $started; then
    say "stopping: the run saves first"
    worker all stop "$run_name" || true
  fi
}

end() { # end CODE [MESSAGE]
  [ $# = 1 ] || say "$2"
  if $delete_after; then delete || say "$name could not be deleted"; fi
  exit "$1"
}

if $dry_run; then
  run "${vm[@]}" describe "$name" "${where[@]}" --format='value(state)'
  create
  attempt "$@"
  end 0
fi

command -v gcloud >/dev/null || { say "gcloud is not on the path"; exit 1; }
commit=$(git rev-parse --short=12 HEAD)
[ -z "$(git status --porcelain)" ] || say "what is not committed is not sent"
archives=$(mktemp -d)
trap 'rm -rf "$archives"' EXIT
trap on_signal INT TERM

for ((starts = 0; ; starts++)); do
  ensure
  attempt "$@"
  now=$(state)
  if [ "$code" = 0 ] || $stopped; then break; fi

  # A preempted TPU can make its workers fail in any way.  Without an answer, too, start again: a run that still
  # goes on is only followed.
  if [ "$now" = READY ] && [ -n "$code" ] && [ "$code" != "$SAVED" ]; then break; fi
  code=${code:-$SAVED}
  [ "$now" = READY ] || code=$SAVED
  ((starts < restarts)) || break
  say "exit code $code, the TPU is $now: starting again ($((starts + 1)) of at most $restarts)"
done
end "${code:-1}" "ended with exit code ${code:-unknown}"
