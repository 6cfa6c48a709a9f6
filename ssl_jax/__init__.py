# SPDX-License-Identifier: Apache-2.0
"""Self-supervised vision pretraining in JAX/Flax: MAE, Pixio, DINOv2, SplitMask on one core."""

import importlib.metadata

__version__ = importlib.metadata.version('ssl_jax')  # of pyproject.toml
__all__ = ['__version__', 'load_model']


def load_model(path, *, dtype=None, **hints):
    """A frozen encoder: a function from images to named features, see `encoder.load_model`."""
    from ssl_jax import encoder  # here, so that `import ssl_jax` imports no jax

    return encoder.load_model(path, dtype=dtype, **hints)
