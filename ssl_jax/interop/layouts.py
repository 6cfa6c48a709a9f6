# SPDX-License-Identifier: Apache-2.0
"""The layouts that weights leave in and come from: which keys, which config, both ways.

Our tree is {'encoder': …} for a backbone and {'encoder': …, 'decoder': …} for MAE and Pixio with
their decoder.  A layout is a table of renames (`tables.py`) chosen by `Weights`.
"""

import dataclasses

from ssl_jax.models.decoder import Decoder
from ssl_jax.models.vit import ViT


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a set of tensors is, without the tensors.

    Attributes:
      family: 'mae', 'pixio', 'dinov2', or 'vit' for a plain ViT that is none of these.
      layout: 'official', 'hf' or 'timm'.
      what: 'backbone', or 'full' with the decoder (MAE and Pixio).
      vit: the encoder, every field set.
      decoder: the decoder of 'full', else None.
      prefix: in front of every encoder key, e.g. 'vit.' where HF wraps the encoder.
      left_out: keys of the file that are no part of these weights (projection heads, poolers).
    """

    family: str
    layout: str
    what: str
    vit: ViT
    decoder: Decoder | None = None
    prefix: str = ''
    left_out: tuple = ()


def recognise(shapes, hints=None):
    """Finds out what a set of tensors is.

    Args:
      shapes: torch key -> array (or only its shape); with arrays, sin-cos tables are told from
        learned ones, with shapes a MAE is taken to have sin-cos tables.
      hints: a parsed config.json (HF or timm) or {}; 'num_heads', 'patch_size', 'img_size',
        'family', 'layout' given by the user are believed before it.

    Returns: Weights.
    Raises: ValueError, one sentence, for tensors of no known family.
    """
    raise NotImplementedError


def rows(weights):
    """The rename rows of `weights`, for `tables.from_torch` and `tables.to_torch`."""
    raise NotImplementedError


def fixed(weights):
    """{our path: sin-cos table} of the tables that are no parameters of ours."""
    raise NotImplementedError


def abstract(weights):
    """Our tree as ShapeDtypeStructs: {'encoder': …} and {'decoder': …} if full."""
    raise NotImplementedError


def to_ours(weights, state_dict, extra=None):
    """State dict (and the tensors of the sidecar) -> our tree of numpy arrays, strictly."""
    raise NotImplementedError


def to_layout(weights, params):
    """Our tree -> (state dict, extra): extra holds what the layout has no place for."""
    raise NotImplementedError


def config_json(weights):
    """config.json of the layout as a dict; {} for 'official'."""
    raise NotImplementedError


def available(vit, decoder, family):
    """{(layout, what): '' or one sentence why this model cannot leave in that layout}."""
    raise NotImplementedError


def family_of(vit):
    """The family whose official code this ViT is an instance of: 'mae', 'pixio', 'dinov2', 'vit'."""
    raise NotImplementedError
