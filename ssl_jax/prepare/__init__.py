# SPDX-License-Identifier: Apache-2.0
"""Commands on training images before a run: `ssl_jax data`."""
