# SPDX-License-Identifier: Apache-2.0
"""What is done with a data set before a training: `ssl_jax data`."""
