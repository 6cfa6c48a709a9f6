#!/usr/bin/env bash
# The runs of this folder side by side, one core each, stopped once on the way and started again,
# then evaluated.
# Usage: SSL_JAX_DATA=/data experiments/cifar10/run.sh [OUT [METHOD ...]]
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/cifar10}
shift || true
methods=("${@:-mae pixio}")
mkdir -p "$out"

one() {  # method, core
  run=(taskset -c "$2" ssl_jax pretrain --config "cifar10_$1" --workdir "$out/$1")
  SECONDS=0
  "${run[@]}" > "$out/$1.log" & pid=$!
  until grep -q '^step 1,000/' "$out/$1.log"; do sleep 5; kill -0 $pid; done
  kill -TERM $pid
  wait $pid
  "${run[@]}" >> "$out/$1.log"
  echo "$1: trained in $((SECONDS / 60)) min $((SECONDS % 60)) s" | tee -a "$out/$1.log"
  taskset -c "$2" ssl_jax eval --workdir "$out/$1" > "$out/$1_eval.txt"
}

pids=()
for method in ${methods[@]}; do
  one "$method" $((${#pids[@]} % $(nproc))) & pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done
tail -n 40 "$out"/*_eval.txt
