#!/usr/bin/env bash
# Scores the encoders of pretrain.sh: CamVid (segmentation, video, correspondence) and rendered scenes.
# Usage: SSL_JAX_DATA=/data experiments/dense/evaluate.sh RUNS
set -euo pipefail
runs=$1
camvid=${SSL_JAX_DATA:-../shared/data}/camvid
for name in camvid_mae mae_0; do
  ssl_jax eval --workdir "$runs/$name" --data "$camvid" --test "$camvid" --size 160 --tasks seg data.ignore=11
  ssl_jax eval --workdir "$runs/$name" --data "$camvid" --split val --size 160 --tasks pck
  ssl_jax eval --workdir "$runs/$name" --data "$camvid" --split val --tasks video data.ignore=11 video.short_side=240
done
for name in mae pixio dinov2; do
  for seed in 0 1; do
    ssl_jax eval --workdir "$runs/${name}_$seed" --tasks linear,seg,depth seg.max_patches=65536 depth.lr=1e-2
  done
done
