# SPDX-License-Identifier: Apache-2.0
"""Small encoders of every family with random weights, a plain one and an odd one of each."""

import zlib

import jax
import numpy as np

from ssl_jax.interop import families, layouts
from ssl_jax.models import vit as vit_lib
from ssl_jax.models.decoder import Decoder
from ssl_jax.models.heads import DINOHead

PLAIN = dict(embed_dim=32, depth=2, num_heads=4, patch_size=8, img_size=32)
# Heads of width 12, three blocks, patches of 14 pixels, a grid of odd side.
ODD = dict(embed_dim=36, depth=3, num_heads=3, patch_size=14, img_size=42)
DINOV2 = dict(layer_scale=1e-5, mask_token=True, init_scheme='dinov2')

ENCODERS = {
    'mae': dict(PLAIN, pos_embed='sincos'),
    'mae_odd': dict(ODD, pos_embed='sincos', mlp_ratio=2.3),
    'vit': PLAIN,
    'vit_odd': dict(ODD, mlp_ratio=1.7),
    'pixio': dict(PLAIN, num_cls_tokens=8),
    'pixio_odd': dict(ODD, num_cls_tokens=3, mlp_ratio=3.0),
    'dinov2': dict(PLAIN, pos_resize='offset', **DINOV2),
    'dinov2_odd': dict(ODD, pos_resize='offset', ffn='swiglu', mlp_ratio=3.0, **DINOV2),
    'dinov2_reg': dict(PLAIN, pos_resize='antialias', num_register_tokens=4, **DINOV2),
    'dinov2_reg_odd': dict(
        ODD, pos_resize='antialias', num_register_tokens=2, ffn='swiglu', **DINOV2
    ),
}
DECODERS = {
    'mae': dict(embed_dim=16, depth=1, num_heads=2, pos_embed='sincos'),
    'mae_odd': dict(embed_dim=20, depth=2, num_heads=5, pos_embed='sincos', mlp_ratio=3.3),
    'pixio': dict(embed_dim=16, depth=1, num_heads=2),
    'pixio_odd': dict(embed_dim=20, depth=2, num_heads=5),
}
# The projection head for class tokens and, where there is one, that for patches.
HEADS = {
    'dinov2': [dict(out_dim=24, hidden_dim=20, bottleneck_dim=8)],
    'dinov2_odd': [
        dict(out_dim=10, hidden_dim=12, bottleneck_dim=6, num_layers=2),
        dict(out_dim=14, hidden_dim=16, bottleneck_dim=5, num_layers=4),
    ],
    'dinov2_reg': [dict(out_dim=24, bottleneck_dim=8, num_layers=1)],
}


def weights(name, layout, what='backbone'):
    """`layouts.Weights` of one of ENCODERS, 'full' with the decoder or the heads of that name."""
    vit, decoder = vit_lib.ViT(**ENCODERS[name]), None
    if what == 'full' and name in HEADS:
        names = ('dino_head', 'ibot_head')[: len(HEADS[name])]
        heads = {k: DINOHead(**fields) for k, fields in zip(names, HEADS[name], strict=True)}
        return layouts.Weights('dinov2', layout, what, vit, prefix='backbone.', **heads)
    if what == 'full':
        decoder = Decoder(
            num_patches=(vit.img_size // vit.patch_size) ** 2,
            num_cls_tokens=vit.num_cls_tokens,
            out_dim=3 * vit.patch_size**2,
            **DECODERS[name],
        )
    return layouts.Weights(families.of(vit), layout, what, vit, decoder)


def params(w, seed=0):
    """Random parameters in which nothing is zero or one, so that nothing hides."""

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        x = rng.standard_normal(leaf.shape).astype(np.float32)
        if name.endswith('kernel'):
            return x / np.float32(leaf.shape[-2] ** 0.5)
        return x * np.float32(0.3) + np.float32(name.endswith(('scale', 'gamma')))

    return jax.tree_util.tree_map_with_path(draw, layouts.abstract(w))


def hints(w):
    """Values that the tensors do not determine."""
    found = {'num_heads': w.vit.num_heads}
    if w.decoder is not None:
        found['decoder_num_heads'] = w.decoder.num_heads
    return found


def rule(w):
    """How the library of a layout resizes positions, where a file says nothing of us."""
    if w.layout == 'timm':
        return 'antialias'
    if w.layout == 'hf':
        return 'antialias' if w.vit.num_register_tokens else 'bicubic'
    return 'offset' if w.family == 'vit' else w.vit.pos_resize


def sizes(vit):
    """Three image sizes (height, width): native, another, and one that is not square."""
    m, p = vit.img_size // vit.patch_size, vit.patch_size
    return [(m * p, m * p), ((m + 2) * p, (m + 2) * p), (2 * p, 5 * p)]


def images(size, n=2, seed=0):
    """float32 (n, height, width, 3), about as normalised images are."""
    return np.random.default_rng(seed).standard_normal((n, *size, 3)).astype(np.float32)


def assert_same_tokens(ours, theirs):
    """Tokens (…, D): largest difference 1e-4 of the largest value, every cosine 0.999999."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert a.shape == b.shape, f'{a.shape} and {b.shape}'
    error = np.abs(a - b).max() / np.abs(b).max()
    assert error <= 1e-4, f'differs by {error:.2e} of the largest value'
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosine = ((a * b).sum(axis=-1) / norms).min()
    assert cosine >= 0.999999, f'cosine {cosine:.8f}'
