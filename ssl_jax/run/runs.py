# SPDX-License-Identifier: Apache-2.0
"""A finished or running run, or imported weights, opened for reading: config, method, weights."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from ssl_jax import config as config_lib
from ssl_jax import methods
from ssl_jax.interop import describe
from ssl_jax.methods import beit
from ssl_jax.models import blocks
from ssl_jax.models import vit as vit_lib
from ssl_jax.models.decoder import Decoder
from ssl_jax.run import checkpoint


@dataclasses.dataclass(frozen=True)
class Run:
    """What a checkpoint holds.

    Attributes:
      config: locked ConfigDict; of an imported encoder the defaults, without `method`.
      method: None where an encoder alone was imported.
      params, extra: numpy.
      step: 0 for imported weights.
      weights: `interop.layouts.Weights` of imported weights, else None.
      meta: the checkpoint's own account, see `checkpoint`.
    """

    config: Any
    method: Any
    params: Any
    extra: Any
    step: int
    weights: Any = None
    meta: Any = dataclasses.field(default_factory=dict)

    def backbone(self):
        """(ViT, its parameters): what evaluation and export see."""
        if self.method is None:
            return self.weights.vit, self.params['encoder']
        return self.method.backbone(self.params, self.extra)

    def whole(self):
        """(modules, parameters): the network that `backbone` is the encoder of, all of it.

        modules: {'decoder'} of a MAE or Pixio, {'dino_head'[, 'ibot_head']} of DINOv2 (the teacher;
          of its distillation the student's average), {'head'} of BEiT, its layer to visual words,
          {} of an encoder alone and where there are no public names (SplitMask).
        parameters: a tree with the same names and 'encoder'.
        """
        method = getattr(self.method, 'dino', self.method)
        modules = {k: getattr(method, k, None) for k in ('decoder', 'dino_head', 'ibot_head')}
        if not isinstance(modules['decoder'], Decoder):
            del modules['decoder']
        if isinstance(method, beit.BEiT) and method.tokenizer is not None:
            modules['head'] = method.head
        if method is None and self.weights.vocab:
            modules['head'] = blocks.Dense(self.weights.vocab, jnp.float32, blocks.truncated_normal)
        modules = {k: m for k, m in modules.items() if m is not None}
        network = self.params
        if 'dino_head' in modules:
            network = self.extra['teacher' if method is self.method else 'student']
        return modules, {**{k: network[k] for k in modules}, 'encoder': self.backbone()[1]}

    def untrained(self, seed):
        """(ViT, fresh parameters of the same encoder): the baseline of an evaluation."""
        if self.method is None:
            vit = self.weights.vit
            return vit, jax.device_get(vit_lib.init_params(vit, jax.random.key(seed)))
        return self.method.backbone(
            *jax.device_get(jax.jit(self.method.init)(jax.random.key(seed)))
        )

    @property
    def transform(self):
        """How images become input of the encoder, see `interop.describe`."""
        if 'imported' in self.meta:
            return self.meta['imported']['transform']
        size, m = self.config.eval.size or self.method.views()[0].size, self.config.method
        if 'crop_pct' not in m:
            return describe.transform_of(size)
        return {**describe.transform_of(size, mean=m.mean, std=m.std), 'crop': m.crop_pct}


def open_run(workdir, step=None):
    """Reads a run from its workdir, or from a bare folder of checkpoints; never its moments.

    Args:
      workdir: local or gs:// path.
      step: which checkpoint; default the newest that is sound.
    """
    workdir = epath.Path(workdir)
    if not workdir.exists():
        raise ValueError(f'there is no run at {workdir}; give the --workdir of a training run.')
    model, meta = checkpoint.restore_model(workdir, step=step)
    config, method, weights = parse(meta)
    extra = model.get('extra') or {}
    return Run(config, method, model['params'], extra, int(meta['step']), weights, meta)


def parse(meta):
    """(config, method, weights) of a checkpoint's own account, as `Run` has them."""
    imported, weights, method = meta.get('imported'), None, None
    if imported:
        weights = describe.from_dict(imported['weights'])
    config = config_lib.from_json(json.dumps(meta['config']))
    if 'method' in config:
        method = methods.from_config(config)
        if weights:  # a few fields, such as an odd eps, are no field of a config
            names = ('vit', 'decoder', 'dino_head', 'ibot_head')
            found = {k: getattr(weights, k) for k in names if hasattr(method, k)}
            method = dataclasses.replace(method, **found)
    return config, method, weights
