#!/usr/bin/env bash
# The tables of docs/scaling.md: programs compiled for slices of TPUs that need not be there.
#
#   launch/tables/scaling.sh OUT
#
# OUT gets one JSON report for each slice; what is there already is kept, so an interrupted run goes on.  Needs
# the extra [tpu].  Minutes for each on a few cores.  Prints the tables as Markdown.
set -euo pipefail
[ $# = 1 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2; }
out=$1
mkdir -p "$out"

compile() { # NAME CONFIG TOPOLOGY SLICES PROGRAMS [--config.key=value ...]
  [ -f "$out/$1.json" ] && return
  local name=$1 config=$2 topology=$3 slices=$4 programs=$5
  shift 5
  # 1 says that it does not fit, which is a result: then there is a report all the same.
  janus-jax compile --config="configs/$config.py" --topology="$topology" --slices="$slices" \
    --programs="$programs" --json="$out/$name.json" "$@" >&2 || [ -f "$out/$name.json" ]
}

compile wmt14-v5e-256 wmt14_ende v5e:16x16 1 train,ar,nar
compile wmt14-v5e-256-fsdp wmt14_ende v5e:16x16 1 train --config.mesh.fsdp=8 --config.loss.chunk=256
compile wmt14-v4-128 wmt14_ende v4:4x4x8 1 train,ar,nar
compile wmt14-v5p-128 wmt14_ende v5p:4x4x8 1 train,ar,nar
compile wmt14-v5e-512 wmt14_ende v5e:16x16 2 train
compile wmt14-v5e-8 wmt14_ende v5e:2x4 1 train
compile wmt14-v5e-64 wmt14_ende v5e:8x8 1 train
large=()
for slice in 8:2x4 16:4x4 32:4x8 64:8x8 128:8x16 256:16x16; do
  compile "large-v5e-${slice%%:*}" bart_large_sized "v5e:${slice#*:}" 1 train
  large+=("$out/large-v5e-${slice%%:*}.json")
done
compile large-v5e-512 bart_large_sized v5e:16x16 2 train

tables=$(dirname "$0")
echo "WMT14"
python "$tables/scaling.py" "$out"/wmt14-{v5e-256,v5e-256-fsdp,v4-128,v5p-128,v5e-512}.json
echo
echo "WMT14, 8 to 512 chips"
python "$tables/scaling.py" "$out"/wmt14-v5e-{8,64,256,512}.json
echo
echo "BART-large-sized"
python "$tables/scaling.py" "${large[@]}" "$out/large-v5e-512.json"
