# Shared by the launchers, which source it: usage, errors, commands that are printed, what an exit code means.
# shellcheck shell=bash

readonly SAVED=75 # janus-jax: stopped on request and saved; started again, it goes on
dry_run=false

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

say() { echo "${0##*/}: $*" >&2; }

misused() {
  say "$1 (${0##*/} --help tells the usage)"
  exit 2
}

# whole NAME VALUE LEAST: complains unless VALUE is a whole number of at least LEAST.
whole() {
  if [[ ! $2 =~ ^[0-9]{1,9}$ ]] || ((10#$2 < $3)); then misused "$1 must be a whole number from $3 up, got '$2'"; fi
}

# The verbs that can run in several processes.
check_verb() {
  [ $# -gt 0 ] || misused "give the command after --, such as: -- train --config=FILE --workdir=DIR"
  [[ $1 =~ ^(train|evaluate)$ ]] || misused "only train and evaluate run in several processes, got '$1'"
}

# The words as one line that a shell reads back as the same words.
quoted() {
  local word line=
  for word; do
    if [[ ! $word =~ ^[A-Za-z0-9_./:=,@%+~-]+$ ]]; then
      [[ $word =~ ^(--[a-z-]+=)?(.*)$ ]]
      word=${BASH_REMATCH[1]}${BASH_REMATCH[2]@Q}
    fi
    line+="${line:+ }$word"
  done
  echo "$line"
}

# Prints a command, and runs it unless this is a dry run.
run() {
  if $dry_run; then
    quoted "$@"
  else
    echo "+ $(quoted "$@")" >&2
    "$@"
  fi
}

# One code for many processes, given theirs in the order in which they ended: the first failure; SAVED if none
# failed but some were stopped; 0.
verdict() {
  local code all=0
  for code; do
    case $code in
      0) ;;
      "$SAVED") all=$SAVED ;;
      *)
        all=$code
        break
        ;;
    esac
  done
  echo "$all"
}
