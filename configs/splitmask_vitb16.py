# SPDX-License-Identifier: Apache-2.0
"""SplitMask ViT-B/16 on ImageNet-1k, 224 px, 300 epochs.

Paper: Are large-scale datasets necessary for self-supervised pre-training?, arXiv 2112.10740,
section 5.5: half of the patches in each branch (blocks of 16 to 75), decoder of 2 layers, 8,192
words, InfoNCE at temperature 0.2, batch 2048; for the rest the hyper-parameters of BEiT: lr 1.5e-3
at batch 2048, 10 epochs of warm-up from 0, cosine to 1e-5, AdamW (0.9, 0.999), decay 0.05, gradient
norm 3, stochastic depth 0.1, crops of 8 to 100 % and flips. There is no public code; what the paper
leaves open is listed in `methods/splitmask.py`. Words are random patches, the best of its
table 2 by 0.1; its own runs used method.tokenizer=random_projection, with a scaling that it does
not give. bfloat16 instead of float16.

Command:
  python -m ssl_jax.train --config=configs/splitmask_vitb16.py:/data/imagenet --workdir=gs://bucket/run
  (the folder has train/ and val/; without it, TFDS' imagenet2012 from TFDS_DATA_DIR)

Expected, of the paper (tables 7 and 8): fine-tuned 83.6 %, linear probe 46.5 %; without InfoNCE
83.3 and 46.4, with InfoNCE alone (method.w_mim=0) 79.3 and 4.0. Not trained here.
Cost: 5.6e19 useful FLOPs: 12 h on TPU v5e-16 or 5 h on 8 H100 at 40 % of peak.
The paper took 34 h on 16 GPUs, BEiT 32.5 h.
"""

from ssl_jax import config


def get_config(arg=''):
    words = config.shared('words')
    data = config.shared('data')
    c = config.default('splitmask')
    c.name = 'splitmask_vitb16'

    c.total_epochs = words.epochs(words.IMAGENET)  # 300
    c.warmup_epochs = 10.0
    c.batch_size = 2048
    c.dtype = 'bfloat16'
    c.remat = 'dots'
    c.mesh.data, c.mesh.fsdp = -1, -1

    words.optim(c.optim)

    c.data.train, c.data.eval_train, c.data.eval_test = data.imagenet(arg)
    c.eval.every_epochs = 20.0
    c.eval.max_train = 130_000
    c.eval.max_test = 10_000

    return c
