# SPDX-License-Identifier: Apache-2.0
"""A duration in steps, epochs or examples becomes steps."""

import types

import pytest

from ssl_jax import config as config_lib
from ssl_jax.run import clock


def fields(**values):
    return types.SimpleNamespace(**values)


@pytest.mark.parametrize(
    ('field', 'value', 'steps'),
    [('total_steps', 7, 7), ('total_epochs', 2.0, 20), ('total_examples', 95, 10),
     ('total_epochs', 0.001, 1), ('total_epochs', 0.0, 0)],
)  # fmt: skip
def test_every_unit_becomes_steps(field, value, steps):
    assert clock.Clock(1, 0, 10, 100).steps('total', fields(**{field: value})) == steps


def test_the_imagenet_recipe_takes_800_passes():
    c = config_lib.load('mae_vitb16')
    found = clock.Clock.of(c, 1_281_167)
    assert found.total == round(800 * 1_281_167 / 4096) == 250_228
    assert found.warmup == round(40 * 1_281_167 / 4096)
    assert (found.batch_size, found.num_examples) == (4096, 1_281_167)


def test_a_duration_without_a_unit_is_the_default_or_an_error():
    c, found = config_lib.default(), clock.Clock(1)
    assert found.steps('warmup', c, 0) == 0
    with pytest.raises(ValueError, match='None of total_steps, total_epochs, total_examples'):
        found.steps('total', c)


def test_two_units_of_one_duration_are_an_error():
    with pytest.raises(ValueError, match='total_steps=1 and total_epochs=2.0 contradict'):
        clock.Clock(1, 0, 10, 100).steps('total', fields(total_steps=1, total_epochs=2.0))


def test_a_negative_duration_is_an_error():
    with pytest.raises(ValueError, match='every_steps=-1 is negative: durations start at 0'):
        clock.Clock(1).steps('every', fields(every_steps=-1))


def test_epochs_of_an_endless_source_are_an_error():
    c = fields(total_epochs=2.0)
    with pytest.raises(ValueError, match='total_epochs needs the number of images'):
        clock.Clock(1, 0, batch_size=10).steps('total', c)
    with pytest.raises(ValueError, match='total_epochs needs the batch size'):
        clock.Clock(1, 0, num_examples=10).steps('total', c)
