#!/usr/bin/env bash
# Scores the encoders of pretrain.sh: CamVid (segmentation, correspondence, video) and rendered scenes
# (classes, segmentation, depth). Two hours on two cores beside other work.
# Usage: SSL_JAX_DATA=/data experiments/dense/evaluate.sh RUNS
set -euo pipefail
runs=$1
camvid=${SSL_JAX_DATA:-../shared/data}/camvid
few='seg.max_patches=65536 seg.cs=(0.05,2,70)'
for name in camvid_mae mae_0; do
  ssl_jax eval --workdir "$runs/$name" --out "$runs/$name/camvid.json" --data "$camvid" --test "$camvid" --size 160 --tasks seg data.ignore=11 $few
  ssl_jax eval --workdir "$runs/$name" --out "$runs/$name/camvid.json" --data "$camvid" --split val --size 160 --tasks pck
  ssl_jax eval --workdir "$runs/$name" --out "$runs/$name/camvid.json" --data "$camvid" --split val --tasks video data.ignore=11 video.short_side=240
done
for seed in 0 1; do
  for name in mae pixio dinov2; do
    ssl_jax eval --workdir "$runs/${name}_$seed" --out "$runs/${name}_$seed/scenes.json" --tasks linear,seg,depth $few depth.lr=1e-2
  done
done
