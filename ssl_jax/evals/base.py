# SPDX-License-Identifier: Apache-2.0
"""Evaluations in the loop: `config.eval.tasks` names them, each is one file of this folder.

The file <name>.py of an evaluation has

  Options                            a frozen dataclass, the fields of `eval.tasks.<name>`, each
                                     with a type and a default, see `ssl_jax.fields`
  run(options, look, state, step)    -> {name: float} for metrics.jsonl, {} if it does not apply
  check(options, look)               optional, once before the first step: a UserError ends the run

with `options` an instance of `Options`, `look` a `Look`, `state` a `step.TrainState` on the mesh,
and `step` the number of steps it was trained for. All processes call `run` with the same arguments
and return the same numbers; files are written by process 0 (`launch.is_main`). An exception in
`run` is a log line and `failed/<name>` (the end of the run with several processes), except
`features.Stopped`, which `look.extract` raises when the run should end.

A new evaluation is that file and its name in the config, `eval.tasks.<name>`.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
from etils import epath

from ssl_jax import encoder, evals, fields
from ssl_jax.data import sources
from ssl_jax.evals import features
from ssl_jax.methods import base
from ssl_jax.run import errors, launch, peers


@dataclasses.dataclass(frozen=True)
class Look:
    """Images and settings of a run, for its evaluations."""

    # config, method, mesh, workdir: of the run.
    config: ml_collections.ConfigDict
    method: base.Method
    mesh: jax.sharding.Mesh
    workdir: epath.Path
    images: Any  # the training images
    # train, test: labelled sources to learn from and to be scored on, or None.
    train: Any
    test: Any
    should_stop: Callable  # whether the run should end, as far as this process knows

    @classmethod
    def of(cls, config, method, mesh, workdir, images, should_stop) -> 'Look':
        """Opens the labelled sources of a run."""

        def opened(spec, purpose):
            source = sources.open_source(spec, purpose)
            launch.log(*(f'{purpose:<9} {note}' for note in getattr(source, 'notes', ())))
            return source

        train, test, classes = None, None, method.classes
        if spec := config.data.eval_train:
            train = images if spec == config.data.train else opened(spec, 'train')
            classes = classes or train.classes
        if spec := config.data.eval_test:
            test = sources.in_classes(opened(spec, 'test'), classes)
        return cls(config, method, mesh, workdir, images, train, test, should_stop)

    @property
    def shown(self):
        """Images for monitors and pictures: the test images, else the training images."""
        return self.images if self.test is None else self.test

    def forward(self, state) -> Callable:
        """The frozen encoder of a state, see `encoder.make_forward`."""
        vit, params = self.method.networks(state.params, state.extra)['encoder']
        return encoder.make_forward(vit, params, mean=self.method.mean, std=self.method.std)

    def reading(self, limit: int | None) -> dict:
        """Arguments of `features.batches`, for `limit` images (None: all)."""
        return dict(
            transform=self.method.transform(self.config.eval.size),
            batch_size=self.config.eval.batch_size,
            mesh=self.mesh,
            limit=limit,
            should_stop=self.should_stop,
        )

    def extract(self, forward, source, limit):
        """Features and labels of at most `limit` images, see `features.extract`."""
        return features.extract(forward, source, **self.reading(limit))


def names() -> list[str]:
    """Evaluations that the loop can run: files of this folder that have `Options`."""
    return sorted(name for name in _files() if hasattr(_module(name), 'Options'))


def _files():
    return [m.name for m in pkgutil.iter_modules(evals.__path__)]


def _module(name):
    return importlib.import_module(f'ssl_jax.evals.{name}')


def load(tasks) -> dict[str, tuple]:
    """{name: (module, options)} of `config.eval.tasks`, checked.

    Raises:
      UserError: an evaluation or an option is unknown, or has a wrong value.
    """
    loaded = {}
    for name, given in tasks.items():
        if name not in _files() or not hasattr(_module(name), 'Options'):
            raise errors.UserError(
                f"There is no evaluation '{name}' for eval.tasks{errors.nearest(name, names())}"
            )
        if given is None:
            continue
        if not isinstance(given, (dict, ml_collections.ConfigDict)):
            raise errors.UserError(
                f'eval.tasks.{name}={given!r} is not a set of options: set '
                f'eval.tasks.{name}.OPTION, or eval.tasks.{name}=None to leave it out.'
            )
        module = _module(name)
        known = fields.specs(module.Options)
        for key in given:
            if key not in known:
                hint = errors.nearest(key, known)
                raise errors.UserError(f"There is no option 'eval.tasks.{name}.{key}'{hint}")
        options = module.Options(**given)
        for problem in fields.problems(module.Options, options, f'eval.tasks.{name}.'):
            raise errors.UserError(problem)
        loaded[name] = module, options
    return loaded


def check(tasks: dict[str, tuple], look: Look) -> None:
    """Calls the `check` of each task that has one.

    Raises:
      UserError: the run cannot be evaluated as configured.
    """
    if tasks and look.config.eval.size:
        features.check_size(look.config.eval.size, look.method.vit.patch_size, 'eval.size')
    for module, options in tasks.values():
        if hasattr(module, 'check'):
            module.check(options, look)


def run(tasks: dict[str, tuple], look: Look, state, step: int) -> dict[str, float]:
    """Results of all tasks; one that fails is a log line and `failed/<name>`.

    Raises:
      features.Stopped: `look.should_stop` ended it.
    """
    rows = {}
    for name, (module, options) in tasks.items():
        peers.at(f'evaluating step {step}, {name}')
        try:
            rows |= module.run(options, look, state, step)
        except features.Stopped:
            raise
        except Exception as error:
            if jax.process_count() > 1:  # the others may wait for this process
                raise
            launch.log(f'evaluation {name} failed at step {step}: {type(error).__name__}: {error}')
            rows[f'failed/{name}'] = 1.0
    return rows
