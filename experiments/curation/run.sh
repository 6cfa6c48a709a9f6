#!/usr/bin/env bash
# MAE on the curated images, the raw pool, and a random selection of the same size: equal updates,
# two seeds, kNN on CIFAR-10. One run after the other, on one core.
# Usage: SSL_JAX_DATA=/data experiments/curation/run.sh [OUT [STEPS]]
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/curation}
steps=${2:-1000}
mkdir -p "$out"
[ -e "$out/random.parquet" ] || python experiments/curation/pool.py "$out" | tee "$out/curation.txt"
for seed in 0 1; do
  for arm in curated raw random; do
    case $arm in
      curated) data=$out/curated/manifest.parquet ;;
      raw) data=$out/pool.parquet ;;
      random) data=$out/random.parquet ;;
    esac
    run=$out/${arm}_$seed
    ssl_jax pretrain --config cifar10_mae --workdir "$run" "data.train=$data" "seed=$seed" \
      total_epochs=None warmup_epochs=None "total_steps=$steps" "warmup_steps=$((steps / 20))" \
      eval.every_epochs=None > "$run.log"
    ssl_jax eval --workdir "$run" --tasks knn --limit 10000 > "$run.eval.txt"
  done
done
python experiments/curation/table.py "$out"
