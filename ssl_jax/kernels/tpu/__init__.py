# SPDX-License-Identifier: Apache-2.0
"""Pallas kernels for TPU."""
