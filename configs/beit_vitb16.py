# SPDX-License-Identifier: Apache-2.0
"""BEiT ViT-B/16 on ImageNet-1k, 224 px, 800 epochs.

Paper: BEiT: BERT pre-training of image transformers, arXiv 2106.08254, and the published command:
75 of 196 patches masked in blocks of 16 or more, 8,192 words, batch 2048, lr 1.5e-3, 10 epochs of
warm-up from 0, cosine to 1e-5, AdamW (0.9, 0.999), decay 0.05 (of mask token and relative positions
too), gradient norm 3, stochastic depth 0.1, LayerScale from 0.1, crops of 8 to 100 %, flips and
colour jitter 0.4. bfloat16 instead of float16. Its words are those of DALL-E's encoder:
method.tokenizer=dvae method.dvae=FILE (the state dict of the published module). The recipe takes
random patches, which SplitMask found as good (75.3 % against 75.2 %, table 2) and 26 % faster.

Command:
  python -m ssl_jax.train --config=configs/beit_vitb16.py:/data/imagenet --workdir=gs://bucket/run
  (the folder has train/ and val/; without it, TFDS' imagenet2012 from TFDS_DATA_DIR)

Expected: fine-tuned 83.2 % after 800 epochs, 82.8 % after 300 with a linear probe of 41.0 %
(SplitMask's tables 7 and 8). Not trained here.
Cost: 1.1e20 useful FLOPs: 25 h on TPU v5e-16 or 10 h on 8 H100 at 40 % of peak.
"""

from ssl_jax import config


def get_config(arg=''):
    words = config.shared('words')
    data = config.shared('data')
    c = config.default('beit')
    c.name = 'beit_vitb16'

    c.total_epochs = 800.0
    c.warmup_epochs = 10.0
    c.batch_size = 2048
    c.dtype = 'bfloat16'
    c.remat = 'dots'

    words.optim(c.optim)

    c.data.train, c.data.eval_train, c.data.eval_test = data.imagenet(arg)
    c.eval.every_epochs = 20.0
    c.eval.max_train = 130_000
    c.eval.max_test = 10_000

    return c
