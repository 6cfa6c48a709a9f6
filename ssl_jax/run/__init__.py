# SPDX-License-Identifier: Apache-2.0
"""One run and its workdir: lock, checkpoints, metrics, signals, hosts."""
