# SPDX-License-Identifier: Apache-2.0
"""A local web page on a model and a folder of images: `ssl_jax explore`."""
