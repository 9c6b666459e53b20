#!/usr/bin/env bash
# Submits one command as a SLURM job on the GPUs of one or more nodes, requeued when it was stopped and saved.
#
#   launch/slurm_gpu.sh [options] -- VERB ARGS...
#   launch/slurm_gpu.sh --nodes=4 --gpus=8 --time=24:00:00 -- train --config=configs/wmt14_ende.py --workdir=/shared/run
#
# Runs `janus-jax VERB ARGS... --distributed` in one process for each GPU.  VERB is train or evaluate.  Submit from
# a folder that all nodes share, with janus-jax on the path; the job gets this environment.  The job's log, in
# DIR/NAME-JOB.log, holds the output of process 0; DIR/NAME-JOB.I.log holds that of process I.
#
#   --nodes=N           nodes (default 1)
#   --gpus=N            GPUs on each node (default 1)
#   --per=gpu|node      one process for each GPU (default), or for each node
#   --cpus=N            CPUs for each process (default 8)
#   --name=NAME         name of the job (default janus-jax)
#   --logs=DIR          folder of the logs (default slurm-logs)
#   --notice=S          SIGTERM comes S seconds ahead of the time limit, to save (default 300)
#   --grace=S           seconds that the others get to end after the first, before SIGKILL (default 300)
#   --restarts=N        requeue up to N times (default 100)
#   --time=, --partition=, --account=, and any other --option=VALUE are sbatch's
#   --dry-run           print the command that submits and those that the job will run, and run none
#
# JANUS_JAX is the program (default janus-jax).  Exit code here: sbatch's; 2 for a wrong command line.  That of the
# job: 0; 75 if it stopped and saved but was not requeued; else that of the process that failed first.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

[[ ${1:-} =~ ^(-h|--help)$ ]] && { usage; exit 0; }
[ $# -gt 0 ] || { usage >&2; exit 2; }
nodes=1 gpus=1 per=gpu cpus=8 name=janus-jax logs=slurm-logs notice=300 grace=300 restarts=100 stage=submit
given=("$@") sbatch=()
while [ $# -gt 0 ]; do
  case $1 in
    --nodes=*) nodes=${1#*=}; whole --nodes "$nodes" 1 ;;
    --gpus=*) gpus=${1#*=}; whole --gpus "$gpus" 1 ;;
    --per=gpu | --per=node) per=${1#*=} ;;
    --per=*) misused "--per must be gpu or node, got '${1#*=}'" ;;
    --cpus=*) cpus=${1#*=}; whole --cpus "$cpus" 1 ;;
    --name=*) name=${1#*=} ;;
    --logs=*) logs=${1#*=} ;;
    --notice=*) notice=${1#*=}; whole --notice "$notice" 1 ;;
    --grace=*) grace=${1#*=}; whole --grace "$grace" 1 ;;
    --restarts=*) restarts=${1#*=}; whole --restarts "$restarts" 0 ;;
    --dry-run) dry_run=true ;;
    --in-job) stage=job ;;       # what follows is the job's side of this script
    --in-process) stage=process ;;
    --) shift; break ;;
    --*=*) sbatch+=("$1") ;;
    *) misused "unknown option '$1'" ;;
  esac
  shift
done
check_verb "$@"
[[ $name =~ ^[A-Za-z0-9_.-]+$ ]] || misused "--name must be letters, digits and _ . -, got '$name'"
case $per in gpu) per_node=$gpus ;; *) per_node=1 ;; esac
count=$((nodes * per_node))
again=() # this command line, to be given to the job's side as well
for word in "${given[@]:0:${#given[@]}-$#}"; do
  case $word in --dry-run | --in-*) ;; *) again+=("$word") ;; esac
done
again+=("$@")
read -ra program <<<"${JANUS_JAX:-janus-jax}"

submit() {
  # No B: before TERM, so that the notice goes to the processes; the job's script hears SIGTERM when it is cancelled.
  run sbatch --job-name="$name" --nodes="$nodes" --ntasks="$count" --ntasks-per-node="$per_node" \
    --cpus-per-task="$cpus" --gpus-per-node="$gpus" --requeue --open-mode=append --signal="TERM@$notice" \
    --output="$logs/%x-%j.log" "${sbatch[@]}" --wrap="exec $(quoted bash "$0" --in-job "${again[@]}")"
}

log_of() { # log_of I: that of process 0 is the job's
  case $1 in 0) echo "$logs/$name-$SLURM_JOB_ID.log" ;; *) echo "$logs/$name-$SLURM_JOB_ID.$1.log" ;; esac
}

steps() { # runs all processes; each writes down its exit code, because srun tells but the highest
  local devices=()
  # By itself JAX, under SLURM, takes the one GPU whose number is that of the process on its node.
  [ "$per" = gpu ] || devices=(env JAX_LOCAL_DEVICE_IDS="$(seq -s , 0 $((gpus - 1)))")
  run "${devices[@]}" srun --ntasks="$count" --cpus-per-task="$cpus" --kill-on-bad-exit=0 --wait="$grace" \
    bash "$0" --in-process "${again[@]}"
}

job() {
  local cancelled=false code=0 file codes=() failed='' result prefix=$logs/$name-$SLURM_JOB_ID
  rm -f "$prefix".*.exit
  trap 'cancelled=true' TERM
  steps || code=$?
  while read -r file; do # in the order of their ends
    codes+=("$(cat "$file")")
    case ${codes[-1]} in 0 | "$SAVED") ;; *) failed=${failed:-${file%.exit}} ;; esac
  done < <(ls -tr "$prefix".*.exit 2>/dev/null)
  if ((${#codes[@]} < count)); then # SIGKILL, or a node that went away
    codes+=($((code == 0 || code == SAVED ? 137 : code)))
    say "$((count - ${#codes[@]} + 1)) of $count processes ended without an exit code"
  fi
  [ -z "$failed" ] || say "process ${failed##*.} of $count failed first; its log: $(log_of "${failed##*.}")"
  result=$(verdict "${codes[@]}")
  rm -f "$prefix".*.exit
  if [ "$result" = "$SAVED" ] && ! $cancelled && ((${SLURM_RESTART_COUNT:-0} < restarts)); then
    say "stopped and saved: to be requeued"
    run scontrol requeue "$SLURM_JOB_ID"
  fi
  say "ended with exit code $result"
  exit "$result"
}

process() {
  local code=0 prefix=$logs/$name-$SLURM_JOB_ID.$SLURM_PROCID
  [ "$SLURM_PROCID" = 0 ] || exec >>"$(log_of "$SLURM_PROCID")" 2>&1
  trap : TERM # stay to write the exit code; the program itself gets the default back
  env PYTHONUNBUFFERED=1 "${program[@]}" "$@" --distributed || code=$?
  echo "$code" >"$prefix.exit"
  exit "$code"
}

case $stage in
  job) job ;;
  process) process "$@" ;;
  submit)
    if $dry_run; then
      submit
      echo "# in the job, again after each requeue:"
      steps
      echo "# in each process:"
      quoted env PYTHONUNBUFFERED=1 "${program[@]}" "$@" --distributed
      echo "# in the job, after exit code $SAVED:"
      run scontrol requeue JOB
      exit
    fi
    command -v sbatch >/dev/null || { say "sbatch is not on the path"; exit 1; }
    mkdir -p "$logs" # sbatch does not make it
    submit
    ;;
esac
