#!/usr/bin/env bash
# Runs one command as N processes on this machine, as a pod of N hosts would.
#
#   launch/local.sh N [options] -- VERB ARGS...
#   launch/local.sh 2 --devices=4 -- train --config=configs/multi30k_deen.py --workdir=runs/m30k
#
# Starts `janus-jax VERB ARGS... --coordinator=localhost:PORT --processes=N --process_id=I` for each I, on a free
# port.  VERB is train or evaluate.  Shows the output of process 0; DIR/I.log keeps that of process I.
# SIGTERM and Ctrl-C reach every process; a second one kills them.
#
#   --devices=K     each process gets K virtual CPU devices (default: the devices that it finds)
#   --logs=DIR      folder of the logs (default: a new temporary one)
#   --grace=S       once a process has failed or stopped, the others get S seconds to end, then SIGKILL (default 60)
#   --restarts=N    start again up to N times when the run was stopped and saved (default 0)
#   --dry-run       print the commands and run none; PORT and DIR stand for what a run would choose
#
# JANUS_JAX is the program (default janus-jax).  Exit code: 0; 75 if some process stopped and saved and none
# failed, so that starting again goes on; else that of the process that failed first, 2 for a wrong command line.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

[[ ${1:-} =~ ^(-h|--help)$ ]] && { usage; exit 0; }
[ $# -gt 0 ] || { usage >&2; exit 2; }
whole N "$1" 1
count=$((10#$1)) devices='' logs='' grace=60 restarts=0
shift
while [ $# -gt 0 ]; do
  case $1 in
    --devices=*) devices=${1#*=}; whole --devices "$devices" 1 ;;
    --logs=*) logs=${1#*=} ;;
    --grace=*) grace=${1#*=}; whole --grace "$grace" 0 ;;
    --restarts=*) restarts=${1#*=}; whole --restarts "$restarts" 0 ;;
    --dry-run) dry_run=true ;;
    --) shift; break ;;
    *) misused "unknown option '$1'" ;;
  esac
  shift
done
check_verb "$@"
read -ra program <<<"${JANUS_JAX:-janus-jax}"

settings=(PYTHONUNBUFFERED=1)
if [ -n "$devices" ]; then
  # Virtual CPU devices share one thread pool, and deadlock in collectives when it is smaller than their number.
  threads=$((2 * count * devices))
  kept=$(sed -E 's/ *--xla_force_host_platform_device_count=[0-9]+//g' <<<"${XLA_FLAGS:-}")
  kept=${kept# }
  settings+=(
    JAX_PLATFORMS=cpu
    NPROC=$((threads > 16 ? threads : 16))
    XLA_FLAGS="${kept:+$kept }--xla_force_host_platform_device_count=$devices"
  )
fi

command_of() { # command_of I PORT: sets `words`
  words=(env "${settings[@]}" "${program[@]}" "${@:3}"
    --coordinator=localhost:"$2" --processes="$count" --process_id="$1")
}

if $dry_run; then
  for ((i = 0; i < count; i++)); do
    command_of "$i" PORT "$@"
    echo "$(quoted "${words[@]}") >> $(quoted "${logs:-DIR}/$i.log") 2>&1 &"
  done
  exit 0
fi

command -v "${program[0]}" >/dev/null || { say "${program[0]} is not on the path"; exit 1; }
logs=${logs:-$(mktemp -d -t janus-jax-XXXXXX)}
mkdir -p "$logs"
fifo=$(mktemp -u "$logs/.ends-XXXXXX")
mkfifo "$fifo"
exec 3<>"$fifo" # each process reports its end here, so the order of the ends is known
rm "$fifo"
set -m # a process group for each process: a signal reaches whatever it started, and Ctrl-C comes to us alone

free_port() { # below the ports that the system hands out by itself
  local port
  while port=$((10000 + RANDOM % 20000)); (exec 4<>"/dev/tcp/localhost/$port") 2>/dev/null; do :; done
  echo "$port"
}

signal_all() { # signal_all NAME: to every process that has not ended
  local i
  for i in "${!running[@]}"; do kill -s "$1" -- "-${running[i]}" 2>/dev/null || true; done
}

stopped=false deadline=''
declare -a running=() # the group of each process that has not ended
declare -a order=() codes=() # processes and their exit codes, as they ended

ended() {
  order+=("$1")
  codes+=("$2")
  unset "running[$1]"
}

# shellcheck disable=SC2317 # the traps call it
on_signal() {
  if $stopped; then
    deadline=$SECONDS
  else
    stopped=true
    say "$1: passed on to all, which save and stop (once more kills them)"
    # TERM for Ctrl-C, too: it means the same to janus-jax, and ends other programs as surely.
    signal_all TERM
  fi
}
trap 'signal_all KILL' EXIT # of what is left, should this script fail
trap 'on_signal SIGTERM' TERM
trap 'on_signal SIGINT' INT

attempt() { # one start of all; returns when the last has ended
  local i port from tail_pid id code part='' line=''
  running=() order=() codes=() deadline=''
  port=$(free_port)
  touch "$logs/0.log"
  from=$(($(wc -c <"$logs/0.log") + 1))
  for ((i = 0; i < count; i++)); do
    command_of "$i" "$port" "$@"
    (
      trap : TERM INT # stay to report; the program itself gets the default back
      code=0
      "${words[@]}" 3>&- || code=$?
      echo "$i $code" >&3
    ) </dev/null >>"$logs/$i.log" 2>&1 &
    running[i]=$!
  done
  if $stopped; then signal_all TERM; fi # it came while they were starting
  tail -c "+$from" -s 0.1 -f --pid="${running[0]}" "$logs/0.log" 3>&- &
  tail_pid=$!

  while [ ${#running[@]} -gt 0 ]; do
    if IFS= read -r -t 0.2 -u 3 part; then
      read -r id code <<<"$line$part"
      line=''
      ended "$id" "$code"
      [ "$code" = 0 ] || deadline=${deadline:-$((SECONDS + grace + 1))} # SECONDS is rounded down
      continue
    fi
    line+=$part # on a busy machine the time may be up in the middle of a line
    if [ -n "$deadline" ] && ((SECONDS >= deadline)); then
      say "killing what has not ended: process ${!running[*]}"
      signal_all KILL
      for id in "${!running[@]}"; do
        wait "${running[id]}" 2>/dev/null || true # else bash prints a line about it
        ended "$id" 137
      done
    fi
  done
  wait "$tail_pid" || true
}

name_failure() { # of the process that failed first: what failed after it most likely failed because of it
  local i id
  for i in "${!order[@]}"; do
    case ${codes[i]} in 0 | "$SAVED") continue ;; esac
    id=${order[i]}
    say "process $id of $count failed with exit code ${codes[i]}; the end of $logs/$id.log:"
    tail -n 10 "$logs/$id.log" | sed 's/^/  | /' >&2
    return
  done
}

for ((starts = 0; ; starts++)); do
  attempt "$@"
  result=$(verdict "${codes[@]}")
  [ "$result" = "$SAVED" ] || break
  if $stopped || ((starts == restarts)); then
    say "stopped and saved: the same command goes on"
    break
  fi
  say "stopped and saved: starting again ($((starts + 1)) of at most $restarts)"
done
name_failure
exit "$result"
