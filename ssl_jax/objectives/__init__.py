# SPDX-License-Identifier: Apache-2.0
"""Losses, masks, visual words and reconstructions: pure functions."""
