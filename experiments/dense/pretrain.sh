#!/usr/bin/env bash
# Encoders of one size and of equal cost, 4.5e13 useful FLOPs each: about 10 minutes each on two idle cores.
# Usage: SSL_JAX_DATA=/data experiments/dense/pretrain.sh RUNS
set -euo pipefail
runs=$1
encoder='method.embed_dim=128 method.depth=6 method.num_heads=4 method.patch_size=8'
camvid=${SSL_JAX_DATA:-../shared/data}/camvid/images
train() { # name recipe fields...
  ssl_jax pretrain --config "$2" --workdir "$runs/$1" $encoder "${@:3}"
}
train camvid_mae scenes_mae data.train.source=folder data.train.path="$camvid" data.train.split=train \
  data.eval_train=None data.eval_test=None method.img_size=96 'method.crop_scale=(0.04,0.5)' total_steps=1670
for seed in 0 1; do
  train mae_$seed scenes_mae total_steps=4000 seed=$seed
  train pixio_$seed scenes_pixio method.decoder_depth=6 total_steps=2380 seed=$seed
  train dinov2_$seed scenes_dinov2 total_steps=743 seed=$seed
done
