# SPDX-License-Identifier: Apache-2.0
"""A finished or running run, opened for reading: its config, method and weights."""

import dataclasses
import json
from typing import Any

from etils import epath

from ssl_jax import checkpoint, methods
from ssl_jax import config as config_lib


@dataclasses.dataclass(frozen=True)
class Run:
    """Attributes: config (locked ConfigDict), method, params and extra (numpy), step."""

    config: Any
    method: Any
    params: Any
    extra: Any
    step: int

    def backbone(self):
        """(ViT, its parameters): what evaluation and export see."""
        return self.method.backbone(self.params, self.extra)


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
    config = config_lib.from_json(json.dumps(meta["config"]))
    method = methods.from_config(config)
    return Run(config, method, model['params'], model.get('extra') or {}, int(meta['step']))
