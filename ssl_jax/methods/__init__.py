# SPDX-License-Identifier: Apache-2.0
"""One file per method; each has `from_config(config, clock) -> Method`.

A Method is a frozen dataclass of pure functions (B is the global batch):

  views()                               the crops the host cuts, see data.pipeline.View
  init(rng)                             -> params, extra (teacher, centres; {} if none)
  loss(params, extra, batch, rng, step) -> loss, (extra, metrics); batch[view.name] is uint8
                                           (B, count, size, size, 3), batch['row'] int32 (B,) the
                                           position in the global batch: randomness is
                                           augment.sample_keys(rng, batch['row'])
  after_update(params, extra, step)     -> extra, e.g. the EMA teacher
  backbone(params, extra)               -> (ViT, its params), what evaluation and export see
  with_backbone(params, extra, encoder) -> params, extra with these parameters wherever the method
                                           has an encoder (student and teacher), for init_from
  flops(batch_size)                     -> useful FLOPs of one step, recomputation not counted

A method that fills in patches also has `reconstruct(params, extra, images, keys)`, the dict of
`reconstruction.pictures` that the loop draws, {} if there is nothing to see.  One with a frozen
teacher has `teacher`, where its weights are, and `load_teacher(extra) -> extra`, called once at the
start of a run.  One that must see images before step 0 has `prepare(extra, batches, seed) -> extra,
lines`, called once after that: `extra` is numpy, `batches` an iterator of host batches of its
views, the lines are for the log.  One that can collapse has `suspect(values, step)`, a sentence on
the newest metrics or None.

A method that learns from labels has `labels = True`: batch['label'] is int32 (B,).  One that
classifies has `logits(params, extra, images) -> {name: (B, K)}` of uint8 images, which the loop
scores on the test images.  Its file may have `complete(config, source) -> config, lines`: what only
the training images can tell, before the method is made.  `repeats` says how many rows in a row of
a batch are crops of one image, 1 if it is not there.  One that computes groups of samples together
has `groups(batch_size)`, how many there are: devices want whole ones (`sharding.uneven_groups`).
"""

import difflib
import importlib
import pkgutil


def names():
    """The methods there are: the modules of this package."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def complete(config, source):
    """(config, lines for the log): fields of the method filled that depend on the images."""
    module = importlib.import_module(f'ssl_jax.methods.{_known(config)}')
    return module.complete(config, source) if hasattr(module, 'complete') else (config, [])


def from_config(config, clock=None):
    """The Method that `config.method.name` names.

    Args:
      config: a whole config.
      clock: durations in steps, see `config.clock`; without it (where nothing trains) all are 1.
    """
    module = importlib.import_module(f'ssl_jax.methods.{_known(config)}')
    return module.from_config(config, clock or (lambda prefix, part=None, default=None: 1))


def _known(config):
    name = config.method.name
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f'did you mean {near[0]!r}?' if near else f'known: {", ".join(names())}.'
        raise ValueError(f'method.name={name!r} is unknown; {hint}')
    return name
