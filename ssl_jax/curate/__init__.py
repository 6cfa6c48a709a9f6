# SPDX-License-Identifier: Apache-2.0
"""Curation of a pool of images: copies go, what is like the queries or rare is kept.

`command.py` runs the stages; each is a file of pure functions of embeddings: `search.py` nearest
neighbours, `copies.py` deduplication, `retrieve.py` retrieval, `kmeans.py` and `tree.py` clusters
and balanced sampling. Embeddings are float32 (n, d), L2-normalised, rows in pool order.

References:
  Oquab et al., arXiv 2304.07193, section 3 and appendix A; Vo et al., arXiv 2405.15613.
"""
