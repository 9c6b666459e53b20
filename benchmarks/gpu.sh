#!/usr/bin/env bash
# Every benchmark in one call on a machine with an NVIDIA GPU, at bfloat16.
#
#   benchmarks/gpu.sh [OUT] [RUN]
#
# OUT (default runs/benchmarks-gpu) gets JSON, tables, pictures and one log for each part; RUN, a trained run, adds
# where a sentence's time goes and the quality/speed curve.  The update of the WMT14 size comes with its utilisation
# and a profile.  Makes .venv-gpu (jax with CUDA) and .venv-peers first.  A part that fails is named at the end with
# its reason, and the others go on.  CUDA=cuda13 chooses another build of jax; TORCH another torch.  On a machine
# that has them all, PYTHON=python3 PEERS=python3 installs nothing: jax for GPUs and what we need in the one, torch
# and transformers in the other.  PARTS="peers step" does these parts alone (sentence, sentence-graphs, curve, peers,
# peers-base, growth, step-wmt14, step).
set -uo pipefail
case "${1:-}" in -h | --help) sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
cd "$(dirname "$0")/.." || exit 1
out=${1:-runs/benchmarks-gpu} run=${2:-}
venv=.venv-gpu
python=${PYTHON:-$venv/bin/python}
# Kept, so that a second call is sooner at work; what it then says of compiling is the time to read it.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/jax}
mkdir -p "$out" || exit 1
failed=()

# part NAME COMMAND...: runs it with a log of its own, and remembers whether it failed.
part() {
  local name=$1
  shift
  case " ${PARTS:-$name} install device " in *" $name "* | *" ${name%-[0-9]*} "*) ;; *) return ;; esac
  echo "+ $*" >&2
  if ! "$@" >"$out/$name.log" 2>&1; then failed+=("$name: $(tail -n 1 "$out/$name.log")"); fi
}

install() {
  [ -n "${PYTHON:-}" ] || [ -e "$venv/.ready" ] && return
  python3 -m venv "$venv" && "$python" -m pip install --quiet -e . "jax[${CUDA:-cuda12}]" && touch "$venv/.ready"
}

part install install
part device "$python" -c 'import jax; d = jax.devices(); print(d); raise SystemExit(d[0].platform != "gpu" and f"no GPU: {d}")'
if [ ${#failed[@]} = 0 ]; then
  if [ -n "$run" ]; then
    part sentence "$python" -m benchmarks.sentence --workdir="$run" --output_dir="$out" --dtype=bfloat16
    # Whole loops as CUDA graphs: the host would wait for no pass any more (docs/performance.md, Kernels).
    part sentence-graphs env XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL" \
      "$python" -m benchmarks.sentence --workdir="$run" --output_dir="$out/graphs" --dtype=bfloat16
    part curve "$python" -m benchmarks.curve --workdir="$run" --output_dir="$out" --dtype=bfloat16
  fi
  # Where the peers' python is given, it is taken as it is; else peers.sh makes one.
  peers=(env PYTHON="$python" benchmarks/peers.sh)
  [ -z "${PEERS:-}" ] || peers=("$python" -m benchmarks.peers --python="$PEERS")
  export XLA_PYTHON_CLIENT_MEM_FRACTION=.5 # the peers want some of it
  part peers "${peers[@]}" --output_dir="$out" --dtype=bfloat16
  part peers-base "${peers[@]}" --output_dir="$out/base" --size=base --dtype=bfloat16
  unset XLA_PYTHON_CLIENT_MEM_FRACTION
  part growth "$python" -m benchmarks.growth --output_dir="$out" --dtype=bfloat16
  # The WMT14 size, at batches that fill the chip more and more; the last that fits is the figure.  No CUDA graphs,
  # so that the profile knows every kernel.
  for tokens in 16384 32768 65536; do
    part "step-wmt14-$tokens" env XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_command_buffer=" "$python" -m benchmarks.step \
      --config=configs/wmt14_ende.py --length=64 --systems=gathered,AR "--config.batch.tokens=$tokens" \
      --config.loss.chunk=8192 "--profile=$out/trace-$tokens" "--json=$out/step-wmt14-$tokens.json"
  done
  part step "$python" -m benchmarks.step --config.model.dtype=bfloat16 "--json=$out/step.json"
fi
for reason in "${failed[@]}"; do echo "failed: $reason" >&2; done
echo "written to $out" >&2
[ ${#failed[@]} = 0 ]
