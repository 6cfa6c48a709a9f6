# SPDX-License-Identifier: Apache-2.0
"""Forms of attention, dense layers and norms, by platform."""
