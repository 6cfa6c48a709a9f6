# SPDX-License-Identifier: Apache-2.0
"""Optimizer, lengths and presets of SplitMask and BEiT."""

IMAGENET = 1_281_167  # images


def optim(o):
    """BEiT's optimizer, which SplitMask follows, in place in `config.optim`."""
    o.base_lr, o.scale_batch = 1.5e-3, 2048  # linear with the batch: the paper does not say
    o.schedule = 'dinov2'  # warm-up from 0 that includes both ends, then a cosine to ...
    o.min_lr = 1e-5
    o.b2 = 0.999
    o.weight_decay = 0.05
    o.no_decay = ('pos_embed$', 'cls_token$')  # mask tokens and relative positions do decay
    o.clip = 3.0


def smallest(m):
    """What SplitMask changes for Stanford Cars, Clipart, Sketch and Painting, in place.

    Each branch sees 25 % of the patches, chosen uniformly; greyscale, solarisation, blur and colour
    jitter. The paper gives neither their strengths (DINO's are taken) nor whether the second
    branch sees the other 75 % (here a disjoint 25 %, so that both tasks are hard).
    """
    m.split, m.split_ratio, m.split_complement = 'uniform', 0.75, False
    m.brightness, m.contrast, m.saturation, m.hue = 0.4, 0.4, 0.2, 0.1
    m.jitter_prob = 0.8
    m.grey_prob = 0.2
    m.blur_prob = 0.5
    m.solarize_prob = 0.2


def small(m):
    """For thousands of images instead of millions, in place in `config.method`.

    No stochastic depth: small models underfit. Crops of a fifth of the area or more: of 8 % a small
    image has few pixels left. No colour jitter: a jittered patch is another word. Reasons, not
    measurements.
    """
    m.drop_path = 0.0
    m.crop_scale = (0.2, 1.0)
    m.jitter_prob = 0.0


def epochs(num_images, most=5000.0):
    """Epochs over `num_images` with as many updates as 300 over ImageNet, at most `most`.

    The paper's rule (sections 3.1 and 5.1) for any batch size. It rounds: 1,400 epochs for
    iNaturalist 2019, 3,000 for COCO, and 21,000 for ADE20k, where no limit is set.
    """
    if num_images < 1:
        raise ValueError(f'{num_images} images make no epoch: give the size of the training set.')
    return min(300.0 * IMAGENET / num_images, most)
