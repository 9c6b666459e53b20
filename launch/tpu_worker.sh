#!/usr/bin/env bash
# What tpu_pod.sh runs on each worker of a TPU VM.  It lies in the unpacked archive of one commit.
#
#   tpu_worker.sh install EXTRAS        once for each commit: a virtual environment with the package
#   tpu_worker.sh start RUN VERB ...    start the command in the background, unless it runs already
#   tpu_worker.sh follow RUN LINES      show its log (from LINES, as tail -n does) until it ends
#   tpu_worker.sh stop RUN              SIGTERM: it saves and ends
#   tpu_worker.sh result RUN S          wait S seconds for its end, else kill it; print its exit code
#
# Log, process id and exit code lie in ~/janus_jax/runs/RUN.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
[ $# -ge 2 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
action=$1
folder=$HOME/janus_jax/runs/$2
poll=${JANUS_JAX_POLL:-1} # seconds between two looks at the run

running() { # the process id may belong to another process since the machine was restarted
  grep -aqs tpu_worker.sh "/proc/$(cat "$folder/pid" 2>/dev/null || echo none)/cmdline"
}

install() {
  local python
  cd "$root"
  [ ! -e .venv/installed ] || return 0
  for python in python3.13 python3.12 python3.11 none; do
    command -v $python >/dev/null && break
  done
  if [ $python = none ]; then # the usual images have Python 3.10
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --clear --seed --python=3.12 .venv
  else
    $python -m venv --clear .venv
  fi
  .venv/bin/python -m pip install --quiet ".[$1]"
  touch .venv/installed
}

case $action in
  install) install "$2" ;;
  start)
    if running; then
      echo "$(hostname): $2 runs already"
      exit
    fi
    mkdir -p "$folder"
    rm -f "$folder/exit"
    [ ! -e "$folder/log" ] || mv "$folder/log" "$folder/log.$(date -u +%Y%m%dT%H%M%S.%N)"
    cd "$root"
    # A session of its own: it outlives the connection, and a signal to its group reaches all of it.
    setsid bash launch/tpu_worker.sh supervise "${@:2}" </dev/null >"$folder/log" 2>&1 &
    echo $! >"$folder/pid"
    ;;
  supervise)
    trap : TERM # stay to write the exit code; the program itself gets the default back
    code=0
    PYTHONUNBUFFERED=1 .venv/bin/janus-jax "${@:3}" || code=$?
    echo $code >"$folder/exit"
    ;;
  follow)
    # The end of the run is that of `running`: for --pid, a zombie that nobody waits for is still alive.
    while running; do sleep "$poll"; done >/dev/null 2>&1 &
    tail -n "$3" -s "$poll" -f --pid=$! "$folder/log"
    ;;
  stop) ! running || kill -TERM -- "-$(cat "$folder/pid")" ;;
  result)
    until ((SECONDS > $3)) || ! running; do sleep "$poll"; done
    if running; then
      echo "$(hostname): $2 did not end in $3 s: killed"
      kill -KILL -- "-$(cat "$folder/pid")"
      echo 137 >"$folder/exit"
    fi
    code=$(cat "$folder/exit" 2>/dev/null || echo 137)
    [[ $code =~ ^(0|75)$ ]] || tail -n 10 "$folder/log" | sed "s/^/$(hostname): | /"
    echo "$(hostname): $2 ended with exit code $code"
    ;;
  *) exit 2 ;;
esac
