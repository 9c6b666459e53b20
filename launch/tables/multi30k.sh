#!/usr/bin/env bash
# The Multi30k table on equal terms: the same data, vocabulary, updates and regularisation for every objective.
#
#   launch/tables/multi30k.sh RAW_DIR OUT [CONFIG] [--config.key=value ...]
#
# RAW_DIR holds the raw Multi30k files; OUT gets one run directory for each objective.  Started again after an
# interruption, it goes on.  OBJECTIVES="ar janus" chooses a part.  Prints the table at the end.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2; }
raw=$1 out=$2
shift 2
config=configs/multi30k_deen.py
case "${1:-}" in *.py) config=$1; shift ;; esac
split=test_2016_flickr

for objective in ${OBJECTIVES:-ar rdrop cmlm janus}; do
  run=$out/$objective
  janus-jax train --config="$config" --workdir="$run" --config.data.raw_dir="$raw" \
    --config.loss.objective="$objective" "$@"
  case $objective in ar | rdrop | janus)
    janus-jax evaluate --workdir="$run" --split=$split --decode=ar --beam=5 ;;
  esac
  case $objective in cmlm | janus)
    for passes in 1 4 10; do
      janus-jax evaluate --workdir="$run" --split=$split --decode=nar --iterations=$passes --candidates=3
    done ;;
  esac
done
python "$(dirname "$0")/table.py" "$out" --split=$split
