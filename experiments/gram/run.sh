#!/usr/bin/env bash
# Goes on with finished DINOv2 runs of experiments/dense, plainly and with the Gram stage, and scores
# patches by kNN segmentation. Half an hour per seed on two busy cores.
# Usage: experiments/gram/run.sh RUNS OUT [SEED ...]   (RUNS/dinov2_0 is read and never written)
set -euo pipefail
runs=$1 out=$2
shift 2
scenes() { # field n size split
  echo "data.$1.source=scenes data.$1.n=$2 data.$1.size=$3 data.$1.split=$4"
}
for seed in "${@:-0}"; do
  start=$out/start_$seed
  [ -e "$start" ] || { mkdir -p "$out"; cp -r "$runs/dinov2_$seed" "$start"; }
  for arm in plain gram; do
    weight=$([ $arm = gram ] && echo 2 || echo 0)
    ssl_jax pretrain --config repair_dinov2 --workdir "$out/${arm}_$seed" "init_from=$start" \
      $(scenes train 4096 96 train) $(scenes eval_train 4096 96 train) $(scenes eval_test 1000 96 test) \
      batch_size=32 total_steps=100 warmup_steps=20 optim.lr=2e-4 optim.min_lr=2e-4 seed=$seed \
      method.momentum_teacher=0.98 method.final_momentum_teacher=0.98 \
      method.gram_weight=$weight method.gram_every=50 eval.every_steps=100 \
      eval.tasks.knn=None eval.tasks.accuracy=None eval.tasks.pictures=None eval.tasks.seg=None
  done
  for arm in start plain gram; do
    ssl_jax eval --workdir "$out/${arm}_$seed" --out "$out/${arm}_$seed/knn.json" --tasks seg \
      seg.max_patches=65536 'seg.cs=()'
  done
done
