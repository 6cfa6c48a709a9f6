# SPDX-License-Identifier: Apache-2.0
"""Self-supervised vision pretraining in JAX/Flax: MAE, Pixio, DINOv2, SplitMask on one core."""

from ssl_jax.version import __version__

__all__ = ['__version__']
