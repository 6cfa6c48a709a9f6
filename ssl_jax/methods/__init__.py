# SPDX-License-Identifier: Apache-2.0
"""Methods, one file each: a frozen dataclass, named METHOD at its end, see `methods.base`."""

import importlib
import pkgutil

from ssl_jax import fields
from ssl_jax.run import errors

SHARED = ('base', 'crops')  # modules that several methods use


def names() -> list[str]:
    """The methods there are: the modules of this package besides those of `SHARED`."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in SHARED)


def get(name: str) -> type:
    """The dataclass of the method `name`."""
    if name not in names():
        raise errors.UserError(f'method.name={name!r} is unknown{errors.nearest(name, names())}')
    return importlib.import_module(f'ssl_jax.methods.{name}').METHOD


def make(config, clock=None):
    """The method that `config.method.name` names.

    Args:
      config: a whole config.
      clock: `run.clock.Clock` of the run; None where nothing trains.
    """
    cls = get(config.method.name)
    values = {name: config.method[name] for name in fields.specs(cls)}
    return cls(**values, dtype=config.dtype, remat=config.remat, clock=clock)
