# SPDX-License-Identifier: Apache-2.0
"""An encoder as a program of `jax.export`, which runs where JAX is and needs nothing of this code.

The weights are an argument: a program that holds them as constants would end at the 2 GB of a
protobuf.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from safetensors import numpy as safetensors_numpy

from ssl_jax.augment import photometry
from ssl_jax.interop import files
from ssl_jax.kernels import forms
from ssl_jax.run import errors, trees

PROGRAM = 'model.jax'
PLATFORMS = ('cpu', 'cuda', 'tpu')
BATCHES = (1, 3)  # sizes of the batches on which a written file is compared with the encoder
TOLERANCE = 1e-5  # largest difference, over the largest value of the encoder


def write(folder, vit, params, transform, dtype):
    """Writes PROGRAM and model.safetensors and compares what they give with the encoder.

    The program takes {name: weight}, names as 'blocks/attn/qkv/kernel', and uint8 images
    (B, S, S, 3) of any number.

    Args:
      folder: pathlib.Path.
      vit, params: the encoder.
      transform: see `files`; S is its size.
      dtype: 'float32' or 'bfloat16', of the weights and of the layers.

    Returns:
      (lines of a model card on its use, {'largest_difference': see `difference`}).

    Raises:
      UserError: the files give other features than the encoder.
    """
    vit = vit.clone(dtype=jnp.dtype(dtype), remat='none')
    view = transform['mean'], transform['std']
    named = {name: np.asarray(x) for name, x in trees.named(params).items()}
    files.write(folder / files.WEIGHTS, named, {'format': 'np'}, dtype)

    def forward(weights, images):
        params = jax.tree.map(lambda x: x.astype(jnp.float32), trees.nested(weights))
        return features(vit, params, photometry.normalize(images, *view))

    def one(weights, image):
        return jax.tree.map(lambda x: x[0], forward(weights, image[None]))

    size = transform['size']
    shapes = {k: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)) for k, x in named.items()}
    (batch,) = jax_export.symbolic_shape('batch')
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8)
    # Of one image, mapped: the forms of a layer depend on the size of the batch, which is unknown.
    with forms.using('off'):
        exported = jax_export.export(jax.jit(jax.vmap(one, (None, 0))), platforms=PLATFORMS)(
            shapes, images
        )
    (folder / PROGRAM).write_bytes(exported.serialize())

    again = jax_export.deserialize(bytearray((folder / PROGRAM).read_bytes()))
    weights = safetensors_numpy.load_file(folder / files.WEIGHTS)
    rounded = {k: x.astype(jnp.dtype(dtype)) for k, x in named.items()}
    rng, worst = np.random.default_rng(0), 0.0
    for n in BATCHES:
        images = rng.integers(0, 256, (n, size, size, 3), np.uint8)
        got, want = again.call(weights, images), jax.jit(forward)(rounded, images)
        worst = max([worst, *(difference(got[k], want[k], PROGRAM) for k in want)])
    return _card(vit, transform, worst), {'largest_difference': worst}


def features(vit, params, images):
    """The outputs of the program for normalised images (B, S, S, 3), float32.

    Returns:
      dict of cls_tokens (B, C, D) and patch_tokens (B, N, D) after the final norm, and their means
      cls and patch (B, D); without class tokens only those of the patches.
    """
    tokens = vit.apply({'params': params}, images)
    out = {'patch_tokens': tokens['patch_tokens'].astype(jnp.float32)}
    out['patch'] = out['patch_tokens'].mean(axis=1)
    if vit.num_cls_tokens:
        out['cls_tokens'] = tokens['cls_tokens'].astype(jnp.float32)
        out['cls'] = out['cls_tokens'].mean(axis=1)
    return out


def difference(got, want, name):
    """The largest difference over the largest value of `want`.

    Raises:
      UserError: it is above TOLERANCE, or `want` is not finite.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if not np.isfinite(want).all():
        raise errors.UserError(
            f'{name} was not written: the encoder gives NaN or infinity for images of noise; '
            f'export an earlier checkpoint with --step.'
        )
    found = np.abs(got - want).max() / np.abs(want).max()
    if not found <= TOLERANCE:
        raise errors.UserError(
            f'{name} was not written: its features differ from those of the encoder by {found:.2e} '
            f'of the largest value, and {TOLERANCE:g} is allowed; export --to official, hf or timm '
            f'instead.'
        )
    return float(found)


def _card(vit, transform, worst):
    """Lines of a model card."""
    size, d, c = transform['size'], vit.embed_dim, vit.num_cls_tokens
    n = (size // vit.patch_size) ** 2
    outputs = [f'`patch_tokens` (batch, {n}, {d}), row by row', f'`patch` (batch, {d}), their mean']
    if c:
        outputs += [f'`cls_tokens` (batch, {c}, {d})', f'`cls` (batch, {d}), their mean']
    return [
        '## Use in JAX',
        '',
        '```python',
        'import jax, numpy as np',
        'from jax import export',
        'from safetensors.numpy import load_file',
        f"model = jax.jit(export.deserialize(bytearray(open('DIR/{PROGRAM}', 'rb').read())).call)",
        f"weights = load_file('DIR/{files.WEIGHTS}')",
        f'images = np.zeros((2, {size}, {size}, 3), np.uint8)  # yours, resized and cropped',
        'features = model(weights, images)  # a dict of arrays',
        '```',
        '',
        f'- Input: the weights, a dict by name, and images, uint8 (batch, {size}, {size}, 3), RGB. '
        f'The batch may have any size, the sides are fixed. Mean and std are applied inside.',
        f'- Output: float32, after the final norm: {", ".join(outputs)}.',
        f'- Lowered for {", ".join(PLATFORMS)}, with the default precision of products there '
        f'(TF32 on newer NVIDIA GPUs, passes of bfloat16 on TPUs), as in training.',
        f'- Read again when it was written and compared with the encoder on batches of '
        f'{" and ".join(map(str, BATCHES))}: the largest difference was {worst:.2g} of the largest '
        f'value.',
        f'- Serialized by jax {jax.__version__}. JAX promises to read such a file for six months; '
        f'after that, export the checkpoint anew.',
    ]
