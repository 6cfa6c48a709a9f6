# SPDX-License-Identifier: Apache-2.0
"""The `method` fields of SplitMask and BEiT, for recipes and for `config.load`."""

import ml_collections

IMAGENET = 1_281_167  # images


def splitmask():
    """An unlocked `ConfigDict` with the values of SplitMask on ImageNet; the size is the recipe's.

    Marked [I] is what the paper leaves open, with the choice made here.
    """
    m = _words('splitmask')
    m.num_cls_tokens = 1  # [I] given to both branches, not predicted, not pooled; 0 for none
    m.pos_embed = 'learned'  # [I] absolute, says the paper; 'learned' or 'sincos'
    m.layer_scale = None  # [I] "original ViT"; BEiT, whose other settings are taken, starts at 0.1
    m.decoder_depth = 2  # of encoder width
    m.decoder_num_heads = None  # [I] None: the encoder's, as the MLP's ratio
    m.decoder_pos = 'mask'  # positions are added to the 'mask' embeddings, or to 'all' tokens [I]
    m.split = 'block'  # 'block' masks, or 'uniform' for the smallest data sets
    m.split_ratio = 0.5  # share of the patches hidden from the first branch; 0.75 with 'uniform'
    m.split_complement = (
        True  # whether the second branch sees just those; False: as many others [I]
    )
    m.min_block = 16  # patches of a block, on a grid of 14x14; in proportion on others [I]
    m.max_block = 75
    m.w_mim = 1.0  # weight of the words' cross-entropy; 0: match only
    m.w_nce = 1.0  # [I] weight of InfoNCE, half for each direction; 0: split and inpaint only
    m.temperature = 0.2  # of InfoNCE
    m.nce_normalize = True  # [I] descriptors of length 1, as in MoCo v3
    m.nce_negatives = 'other'  # [I] of the other branch; 'both': of the own branch too
    m.nce_group_size = 0  # [I] images among which negatives are; 0: the global batch
    m.nce_moco_scale = False  # [I] MoCo v3's factor of 2 x temperature
    m.proj_dim = 0  # [I] outputs of a two-layer MLP between descriptor and InfoNCE; 0: none
    return m


def beit():
    """An unlocked `ConfigDict` with the values of BEiT's base model; the size is the recipe's."""
    m = _words('beit')
    m.layer_scale = 0.1  # start of the factor on each residual branch; 1e-5 in the large model
    m.abs_pos = False  # whether learned absolute positions are added to the relative ones
    m.mask_patches = 75  # and min_block, max_block: on a grid of 14x14; in proportion on others
    m.min_block = 16
    m.max_block = 75
    m.mask_exact = True  # single patches fill a mask up; False: it may end below its target
    m.brightness = m.contrast = m.saturation = 0.4
    m.jitter_prob = 1.0
    return m


def _words(name):
    m = ml_collections.ConfigDict()
    m.name = name
    m.size = 'B'  # key of models.vit.SIZES, fills the next three where they are None
    m.embed_dim = None  # encoder width, channels
    m.depth = None  # encoder blocks
    m.num_heads = None
    m.patch_size = 16  # pixels
    m.img_size = 224  # pixels, height and width of a training crop
    m.mlp_ratio = 4.0  # hidden width of the MLP / embed_dim
    m.drop_path = 0.1  # stochastic depth of the last encoder block; linear from 0 at the first

    # What masked patches are classified into, see ssl_jax.tokenizers; SplitMask used
    # random_projection (its scaling and centring are not given), BEiT the dvae.
    m.tokenizer = 'random_patches'  # or random_projection, kmeans, dvae; 'pixel': MAE's regression
    m.vocab = 8192  # words
    m.token_patch_size = 8  # pixels of a patch in the tokenizer's image
    m.token_norm = (
        'imagenet'  # pixels as 'imagenet' mean and deviation, 'signed' or 'none' make them
    )
    m.token_centre = (
        'auto'  # mean of a 'patch' or its 'channel's removed; 'none'; 'auto': it depends
    )
    m.token_range = (-1.0, 1.0)  # of a random projection's uniform numbers
    m.kmeans_patches = 3_000_000  # patches that k-means sees before step 0
    m.dvae = ''  # weights of DALL-E's encoder, see tokenizers.dvae_codebook
    m.dvae_width = 256  # channels of its first group
    m.min_perplexity = 50.0  # a run with fewer words in effect is refused; 0: any

    m.crop_scale = (0.08, 1.0)  # RandomResizedCrop: fraction of the image's area
    m.crop_ratio = (3 / 4, 4 / 3)  # RandomResizedCrop: width / height
    m.flip = 0.5  # probability of a horizontal flip
    m.brightness = 0.0  # colour jitter, largest changes as torchvision's ColorJitter takes them ...
    m.contrast = 0.0
    m.saturation = 0.0
    m.hue = 0.0
    m.jitter_prob = 0.0  # ... and the probability that there is any
    m.grey_prob = 0.0
    m.blur_prob = 0.0
    m.solarize_prob = 0.0
    return m


def optim(o):
    """BEiT's optimizer, which SplitMask follows, in place in `config.optim`."""
    o.base_lr, o.scale_batch = 1.5e-3, 2048  # [I] linear with the batch
    o.schedule = 'dinov2'  # warm-up from 0 that includes both ends, then a cosine to ...
    o.min_lr = 1e-5
    o.b2 = 0.999
    o.weight_decay = 0.05
    o.no_decay = ('pos_embed$', 'cls_token$')  # mask tokens and relative positions do decay
    o.clip = 3.0


def smallest(m):
    """What SplitMask changes for Stanford Cars, Clipart, Sketch and Painting, in place.

    Each branch sees 25 % of the patches, chosen uniformly; greyscale, solarisation, blur and colour
    jitter.  The paper gives neither their strengths (DINO's are taken) nor whether the second
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

    The paper's rule (sections 3.1 and 5.1) for any batch size.  It rounds: 1,400 epochs for
    iNaturalist 2019, 3,000 for COCO, and 21,000 for ADE20k, where no limit is set.
    """
    if num_images < 1:
        raise ValueError(f'{num_images} images make no epoch: give the size of the training set.')
    return min(300.0 * IMAGENET / num_images, most)
