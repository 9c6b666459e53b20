#!/usr/bin/env bash
# Runs one command on TPU slices of a GKE cluster: fills in gke.yaml, a JobSet, and applies it with kubectl.
#
#   launch/gke.sh NAME IMAGE ACCELERATOR TOPOLOGY [options] -- VERB ARGS...
#   launch/gke.sh run1 REGISTRY/janus-jax tpu-v5-lite-podslice 4x8 -- train --config=configs/wmt14_ende.py --workdir=gs://bucket/run
#
# Runs `janus-jax VERB ARGS... --distributed` on each host of each slice.  VERB is train or evaluate.  IMAGE holds
# this version of the package with the extra [tpu], and configs/ in its working folder.  The cluster has JobSet
# 0.6 or newer and node pools of that ACCELERATOR and TOPOLOGY.
#
#   --slices=N          slices (default 1)
#   --chips=N           chips on each host (default 4)
#   --spot              on spot nodes
#   --namespace=NAME    (default default)
#   --service-account=NAME   Kubernetes account of the pods, allowed to write to the workdir (default default)
#   --grace=S           seconds to save in between SIGTERM and SIGKILL (default 300; spot nodes leave less)
#   --restarts=N        the JobSet starts again up to N times (default 20)
#   --dry-run           print the manifest and apply nothing
#
# To stop it, or to change it: kubectl delete jobset NAME.  Exit code: kubectl's; 2 for a wrong command line.
# The job itself starts again after 75 (stopped and saved), an eviction or death by a signal, and
# fails after 1 and 2.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

[[ ${1:-} =~ ^(-h|--help)$ ]] && { usage; exit 0; }
[ $# -ge 4 ] || { usage >&2; exit 2; }
[[ $1 =~ ^[a-z]([a-z0-9-]{0,30}[a-z0-9])?$ ]] ||
  misused "NAME must be up to 32 lower-case letters, digits and hyphens, got '$1'"
[[ $2 =~ ^[A-Za-z0-9._:/@-]+$ ]] || misused "IMAGE is no name of an image: '$2'"
[[ $3 =~ ^tpu[a-z0-9-]+$ ]] || misused "ACCELERATOR must be like tpu-v5-lite-podslice, got '$3'"
[[ $4 =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || misused "TOPOLOGY must be like 4x8 or 4x4x8, got '$4'"
topology=$4
declare -A value=([NAME]=$1 [IMAGE]=$2 [ACCELERATOR]=$3 [TOPOLOGY]=$4 [SLICES]=1 [CHIPS]=4 [NAMESPACE]=default
  [SERVICE_ACCOUNT]=default [GRACE]=300 [RESTARTS]=20)
spot=false
shift 4
while [ $# -gt 0 ]; do
  case $1 in
    --slices=* | --chips=* | --grace=* | --restarts=*)
      key=${1%%=*}
      least=1
      [ "$key" != --restarts ] || least=0
      whole "$key" "${1#*=}" "$least"
      key=${key#--}
      value[${key^^}]=$((10#${1#*=}))
      ;;
    --namespace=* | --service-account=*)
      key=${1%%=*}
      [[ ${1#*=} =~ ^[a-z0-9.-]+$ ]] || misused "$key must be a Kubernetes name, got '${1#*=}'"
      key=${key#--}
      key=${key//-/_}
      value[${key^^}]=${1#*=}
      ;;
    --spot) spot=true ;;
    --dry-run) dry_run=true ;;
    --) shift; break ;;
    *) misused "unknown option '$1'" ;;
  esac
  shift
done
check_verb "$@"
chips=$((${topology//x/*}))
((chips % value[CHIPS] == 0)) ||
  misused "--chips=${value[CHIPS]} must divide the $chips chips of topology $topology"
value[HOSTS]=$((chips / value[CHIPS]))

args=
for word in "$@" --distributed; do # JSON strings, which YAML reads
  [[ $word != *[[:cntrl:]]* ]] || misused "an argument holds a control character: ${word@Q}"
  word=${word//\\/\\\\}
  word=${word//\$(/\$\$(} # Kubernetes would fill in a variable
  args+="${args:+, }\"${word//\"/\\\"}\""
done
value[ARGS]="[$args]"

manifest() {
  local line key
  while IFS= read -r line; do
    [[ $line =~ ^# ]] && continue
    if [[ $line == *'# --spot' ]]; then
      $spot || continue
      line=${line% # --spot}
    fi
    while [[ $line =~ \{\{([A-Z_]+)\}\} ]]; do
      key=${BASH_REMATCH[1]}
      # What is filled in is not looked at again: it may hold braces of its own.
      printf '%s%s' "${line%%"{{$key}}"*}" "${value[$key]}"
      line=${line#*"{{$key}}"}
    done
    printf '%s\n' "$line"
  done <"$(dirname "$0")/gke.yaml"
}

if $dry_run; then
  manifest
  exit
fi
command -v kubectl >/dev/null || { say "kubectl is not on the path"; exit 1; }
manifest | run kubectl apply -f -
say "log of host 0: kubectl logs -f -n ${value[NAMESPACE]} -l \
jobset.sigs.k8s.io/jobset-name=${value[NAME]},jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
