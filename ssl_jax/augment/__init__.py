# SPDX-License-Identifier: Apache-2.0
"""Photometry, RandAugment, erasing, mixup and CutMix: pure functions, on the device."""
