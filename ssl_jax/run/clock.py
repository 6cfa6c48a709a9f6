# SPDX-License-Identifier: Apache-2.0
"""Durations of a run in optimizer steps.

Durations are written with their unit in the name: `total_epochs=800`, `warmup_steps=1000`,
`every_examples=1e6`. A step is one optimizer update, an example one image seen (`batch_size` per
step, over all devices and micro-batches), an epoch the whole training set. Batches run across the
borders of epochs, so E epochs are round(E * num_examples / batch_size) steps. At most one unit of a
duration is set.
"""

import dataclasses
from typing import Any

from ssl_jax.run import errors

UNITS = ('steps', 'epochs', 'examples')


def duration(prefix: str, fields: Any) -> tuple[str | None, float | None]:
    """(unit, value) of the field `{prefix}_{steps,epochs,examples}` that is set, or (None, None).

    Raises:
      UserError: several are set, or the value is negative.
    """
    values = {unit: getattr(fields, f'{prefix}_{unit}', None) for unit in UNITS}
    values = {unit: value for unit, value in values.items() if value is not None}
    if len(values) > 1:
        both = ' and '.join(f'{prefix}_{unit}={value}' for unit, value in values.items())
        raise errors.UserError(f'{both} contradict each other: keep one and set the other to None.')
    for unit, value in values.items():
        if value < 0:
            raise errors.UserError(f'{prefix}_{unit}={value} is negative: durations start at 0.')
        return unit, value
    return None, None


@dataclasses.dataclass(frozen=True)
class Clock:
    """Lengths of one run; methods and schedules convert their durations with it."""

    total: int  # steps of the run
    warmup: int = 0  # steps of the learning rate's warm-up
    batch_size: int | None = None  # images per step
    num_examples: int | None = None  # images in the training set, None if unknown

    @classmethod
    def of(cls, config: Any, num_examples: int | None = None) -> 'Clock':
        """The clock of a config (`total_*`, `warmup_*`, `batch_size`)."""
        free = cls(1, 0, config.batch_size, num_examples)
        return dataclasses.replace(
            free, total=free.steps('total', config), warmup=free.steps('warmup', config, 0)
        )

    def steps(self, prefix: str, fields: Any, default: int | None = None) -> int:
        """Optimizer steps of the duration `prefix`; at least 1 if it is positive.

        Args:
          prefix: 'total', 'warmup', 'every', 'warm_freeze', ...
          fields: object with fields `{prefix}_steps`, `_epochs`, `_examples`.
          default: result if none is set; None makes that an error.

        Raises:
          UserError: see `default`, `duration`; or the unit needs a number that is unknown.
        """
        unit, value = duration(prefix, fields)
        if unit is None:
            if default is None:
                names = ', '.join(f'{prefix}_{u}' for u in UNITS)
                raise errors.UserError(
                    f'None of {names} is set: set one, such as {prefix}_steps=1000.'
                )
            return default
        if unit == 'steps':
            return int(value)
        if not self.batch_size:
            raise errors.UserError(
                f'{prefix}_{unit} needs the batch size: set batch_size or {prefix}_steps.'
            )
        if unit == 'epochs':
            if not self.num_examples:
                raise errors.UserError(
                    f'{prefix}_epochs needs the number of images, which is unknown: set '
                    f'{prefix}_steps or {prefix}_examples.'
                )
            value = value * self.num_examples
        return max(round(value / self.batch_size), int(value > 0))
