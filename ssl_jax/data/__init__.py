# SPDX-License-Identifier: Apache-2.0
"""Sources, host operations, and a stream of uint8 batches that is a function of the step."""
