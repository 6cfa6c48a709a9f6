#!/usr/bin/env bash
# Both runs of this folder, each stopped once on the way and started again, then evaluated.
# Usage: SSL_JAX_DATA=/data experiments/cifar10/run.sh [OUT]
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/cifar10}
mkdir -p "$out"
for method in mae pixio; do
  run=(ssl_jax pretrain --config "cifar10_$method" --workdir "$out/$method")
  "${run[@]}" > "$out/$method.log" & pid=$!
  until grep -q '^step 1,000/' "$out/$method.log"; do sleep 5; kill -0 $pid; done
  kill -TERM $pid
  wait $pid
  "${run[@]}" >> "$out/$method.log"
  ssl_jax eval --workdir "$out/$method" | tee "$out/${method}_eval.txt"
done
