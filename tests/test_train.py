# SPDX-License-Identifier: Apache-2.0
"""The loop: restarts are bitwise, meshes agree, bad updates touch nothing."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tiny
from ssl_jax import methods, optim, sharding, train
from ssl_jax import step as step_lib
from ssl_jax.data import loader, sources
from ssl_jax.data import stream as stream_lib
from ssl_jax.evals import base as evals
from ssl_jax.run import checkpoint, metrics, start
from ssl_jax.run import clock as clock_lib
from ssl_jax.run import workdir as workdir_lib


def final_state(workdir, config):
    """The last checkpoint of a run as numpy."""
    method = methods.make(config, clock_lib.Clock.of(config))
    program = step_lib.make_program(config, method)
    saved = checkpoint.Checkpointer(workdir / 'checkpoints')
    state, _ = saved.restore(program.abstract)
    saved.close()
    return jax.tree.map(np.asarray, state)


def rows(workdir):
    """Metrics without what depends on the clock."""
    return [{k: v for k, v in r.items() if k != 'time'} for r in metrics.read(workdir)]


def assert_same_bits(a, b):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    """(config, workdir) of a run that nothing disturbed."""
    config, workdir = tiny.config(), tmp_path_factory.mktemp('unbroken')
    train.train(config, workdir)
    return config, workdir


class Killed(BaseException):
    """Stands for a SIGKILL: no handler of the loop may catch it."""


def killed_run(config, workdir, step, monkeypatch):
    """Runs until `step` batches were read, then dies without saving."""
    real = loader.Stream.__next__
    left = [step]

    def dying(self):
        if not left[0]:
            raise Killed
        left[0] -= 1
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(loader.Stream, '__next__', dying)
        with pytest.raises(Killed):
            train.train(config, workdir)


SLOW = [pytest.param(step, marks=pytest.mark.slow) for step in (1, 5)]


@pytest.mark.parametrize('step', [*SLOW, 7])
def test_a_killed_run_continues_to_the_bits_of_an_unbroken_one(
    unbroken, tmp_path, monkeypatch, step, capsys
):
    config, want = unbroken
    config = tiny.config(checkpoint__every_steps=2)
    killed_run(config, tmp_path, step, monkeypatch)
    capsys.readouterr()
    train.train(config, tmp_path)
    said, book = capsys.readouterr().out, json.loads((tmp_path / 'ledger.json').read_text())
    assert '1 steps to do again' in said and re.search(r'first step after \d+ s: ', said), said
    assert said.splitlines()[-1].startswith('goodput ')
    assert (book['steps'], book['finished']) == (8, True) and book['seconds']['recomputed'] > 0
    assert_same_bits(final_state(tmp_path, config), final_state(want, config))
    assert rows(tmp_path) == rows(want)


def scores_of(source, loss, folder):
    """A file as `ssl_jax data score` writes it."""
    loss = np.asarray(loss, np.float32)
    about = dict(kind='scores', data=source.fingerprint, images=len(source))
    ones = np.ones(len(loss), np.int32)
    table = pa.table(
        dict(id=np.arange(len(loss)), loss=loss, entropy=loss, height=ones, width=ones)
    )
    pq.write_table(
        table.replace_schema_metadata({'ssl_jax': json.dumps(about)}), folder / 's.parquet'
    )
    return str(folder / 's.parquet')


def test_a_killed_run_on_a_mixture_continues_to_the_bits_of_an_unbroken_one(
    tmp_path, monkeypatch, capsys
):
    parts = [dict(source='scenes', n=40, size=32, split=split) for split in ('train', 'test')]
    path = scores_of(sources.open_source(parts[1]), [0.1] * 30 + [0.9] * 10, tmp_path)
    mixed = ({**parts[0], 'weight': 3}, {**parts[1], 'weight': 0.5, 'scores': path})
    config = tiny.config(data__train=mixed, checkpoint__every_steps=2)
    train.train(config, tmp_path / 'unbroken')
    killed_run(config, tmp_path / 'killed', 5, monkeypatch)
    capsys.readouterr()
    train.train(start.continued(config, tmp_path / 'killed'), tmp_path / 'killed')
    assert '85.7% of scenes, 40 images' in capsys.readouterr().out
    states = [final_state(tmp_path / name, config) for name in ('unbroken', 'killed')]
    assert_same_bits(*states)
    found = rows(tmp_path / 'unbroken')
    assert found == rows(tmp_path / 'killed')
    seen = [(r['images/scenes.0'], r['images/scenes.1']) for r in found if 'loss' in r]
    assert seen[:3] == [(14, 2), (27, 5), (41, 7)] and seen[-1] == (110, 18)


@pytest.mark.slow
def test_a_kill_between_a_save_and_its_evaluation_costs_neither(tmp_path, monkeypatch):
    config = tiny.config(checkpoint__every_steps=4, eval__every_steps=4)
    train.train(config, tmp_path / 'unbroken')

    def dying(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(evals, 'run', dying)
        with pytest.raises(Killed):
            train.train(config, tmp_path / 'killed')
    assert checkpoint.steps(tmp_path / 'killed' / 'checkpoints') == [4]
    assert not metrics.has_evaluation(tmp_path / 'killed', 4)
    train.train(config, tmp_path / 'killed')
    assert rows(tmp_path / 'killed') == rows(tmp_path / 'unbroken')


def test_the_same_config_gives_the_same_bits(unbroken, tmp_path):
    config, want = unbroken
    train.train(config, tmp_path)
    assert_same_bits(final_state(tmp_path, config), final_state(want, config))


def test_a_finished_run_is_left_as_it_is(unbroken):
    config, workdir = unbroken
    before = rows(workdir)
    result = train.train(config, workdir)
    assert result['step'] == config.total_steps and rows(workdir) == before


@pytest.mark.slow
def test_other_loader_threads_and_seeds(unbroken, tmp_path):
    config, want = unbroken
    train.train(tiny.config(data__num_threads=4), tmp_path / 'threads')
    assert rows(tmp_path / 'threads') == rows(want)
    train.train(tiny.config(seed=1), tmp_path / 'seed')
    assert rows(tmp_path / 'seed') != rows(want)


CLOCK = clock_lib.Clock(total=100, warmup=10, batch_size=16, num_examples=64)
RATES = dict(lr=1e-3, weight_decay=0.05)


def losses_on(devices, steps, accum_steps=1, **mesh):
    """Losses and initial weights of the tiny run on a mesh."""
    config = tiny.config(total_steps=steps, accum_steps=accum_steps)
    method = methods.make(config, CLOCK)
    mesh = sharding.make_mesh(**mesh, devices=jax.devices()[:devices])
    program = step_lib.make_program(config, method, mesh)
    rows = sharding.process_rows(mesh, config.batch_size)
    found = []
    with jax.set_mesh(mesh):
        state = program.init()
        start = jax.tree.map(np.asarray, state.params)
        source = sources.open_source(config.data.train)
        with stream_lib.train_stream(
            source, method.views(), batch_size=config.batch_size, seed=0
        ) as stream:
            for _ in range(steps):
                batch = {'image': next(stream)['image']}
                batch = sharding.to_global(batch, mesh, rows, config.batch_size)
                state, m = program.step(state, batch)
                found.append(float(m['loss']))
    return np.array(found), start


@pytest.fixture(scope='module')
def one_device():
    return losses_on(1, 50)


@pytest.mark.parametrize(
    'mesh',
    [
        pytest.param(dict(devices=4), marks=pytest.mark.slow),
        dict(devices=8),
        pytest.param(dict(devices=8, fsdp=8, data=1), marks=pytest.mark.slow),
        pytest.param(dict(devices=8, data=2, fsdp=2, tensor=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_loss_does_not_depend_on_the_mesh(one_device, mesh):
    losses, start = losses_on(steps=50, **mesh)
    want, want_start = one_device
    assert_same_bits(start, want_start)
    assert abs(losses[0] / want[0] - 1) <= 1e-6
    # Rounding grows along the run; 50 steps at this rate stay below 2e-4.
    assert np.abs(losses / want - 1).max() <= 2e-4
    assert want[-1] < want[0]


def test_micro_batches_give_the_loss_and_update_of_the_whole_batch(one_device):
    losses, _ = losses_on(1, 3, accum_steps=4)
    np.testing.assert_allclose(losses, one_device[0][:3], rtol=2e-6)


def test_nothing_compiles_after_the_second_step(tmp_path, monkeypatch):
    compiled = []

    def listen(event, duration, **kw):
        if event == '/jax/core/compile/backend_compile_duration':
            compiled.append(event)

    counts = []
    real = loader.Stream.__next__

    def counting(self):
        counts.append(len(compiled))
        return real(self)

    monkeypatch.setattr(loader.Stream, '__next__', counting)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        train.train(tiny.config(), tmp_path)
    finally:
        jax.monitoring.clear_event_listeners()
    assert counts[0] > 0, 'the listener heard nothing'
    # The first 8 are the batches of the run; evaluation at its end reads some more.
    assert len(set(counts[2:8])) == 1, counts


def poisoned(method, at, what='both'):
    """The method, with a NaN in loss, gradient or both at the steps `at`; counts in extra."""

    def loss_alone(loss):
        return loss + jnp.nan

    def gradient_alone(loss):
        return loss + jnp.sqrt(loss - jax.lax.stop_gradient(loss)) * 0

    def both(loss):
        return loss * jnp.nan

    poison = {'loss': loss_alone, 'gradient': gradient_alone, 'both': both}[what]

    @dataclasses.dataclass(frozen=True)
    class Poisoned(type(method)):
        def init(self, rng):
            return super().init(rng)[0], {'sum': jnp.zeros(()), 'updates': jnp.zeros(())}

        def loss(self, params, extra, batch, rng, step):
            loss, (changes, metrics) = super().loss(params, extra, batch, rng, step)
            bad = jnp.isin(step, jnp.asarray(list(at)))
            changes = {**changes, 'sum': extra['sum'] + 1}
            return jax.lax.cond(bad, poison, lambda loss: loss, loss), (changes, metrics)

        def after_update(self, params, extra, step):
            return {**extra, 'updates': extra['updates'] + 1}

    return Poisoned(**{f.name: getattr(method, f.name) for f in dataclasses.fields(method)})


@pytest.mark.parametrize(
    'what', ['gradient', *(pytest.param(x, marks=pytest.mark.slow) for x in ('loss', 'both'))]
)
def test_a_non_finite_loss_or_gradient_leaves_weights_moments_and_extra_bit_for_bit(what):
    config = tiny.config()
    method = poisoned(methods.make(config), at=[1], what=what)
    params, extra = method.init(jax.random.key(0))
    tx, _ = optim.make(config.optim, params)
    step = jax.jit(step_lib.make_step(method, tx, lambda s: RATES, seed=0))
    batch = {'image': np.full((16, 1, 32, 32, 3), 7, np.uint8) * np.arange(1, 4, dtype=np.uint8)}
    first, _ = step(step_lib.TrainState.create(params, extra, tx), batch)
    second, m = step(first, batch)
    kept = (first.params, first.opt_state, first.extra)
    assert_same_bits(kept, (second.params, second.opt_state, second.extra))
    assert np.isfinite(m['loss']) == (what == 'gradient')
    assert np.isfinite(m['grad_norm']) == (what == 'loss')
    assert (int(second.step), m['skipped_in_a_row'], m['skipped_total']) == (2, 1, 1)
    third, m = step(second, batch)
    assert (m['skipped_in_a_row'], m['skipped_total']) == (0, 1)
    assert third.extra == {'sum': 2, 'updates': 2}
    assert not np.array_equal(
        third.params['decoder']['decoder_pred']['bias'],
        second.params['decoder']['decoder_pred']['bias'],
    )


def test_a_run_of_non_finite_steps_ends_with_a_sentence(tmp_path, monkeypatch):
    config = tiny.config(total_steps=20, nonfinite__in_a_row=2)
    real = methods.make
    monkeypatch.setattr(methods, 'make', lambda *args: poisoned(real(*args), at=range(3, 20)))
    with pytest.raises(metrics.NonFiniteError, match='3 steps in a row'):
        train.train(config, tmp_path)
    assert np.isfinite(final_state(tmp_path, config).params['encoder']['cls_token']).all()


def test_a_second_run_on_a_live_workdir_is_refused(tmp_path):
    with (
        workdir_lib.lock(tmp_path),
        pytest.raises(workdir_lib.LockedError, match='in use by process'),
    ):
        train.train(tiny.config(), tmp_path)


def test_init_from_takes_weights_and_starts_at_step_zero(unbroken, tmp_path):
    config, other = unbroken
    config = tiny.config(init_from=str(other), total_steps=1, warmup_steps=0, optim__lr=0.0)
    train.train(config, tmp_path)
    got, want = final_state(tmp_path, config), final_state(other, config)
    assert_same_bits(got.params, want.params)
    assert int(got.step) == 1


def test_resume_from_takes_the_full_state_of_another_run(unbroken, tmp_path):
    _, other = unbroken
    config = tiny.config(resume_from=str(other), total_steps=9)
    train.train(config, tmp_path)
    assert [r['step'] for r in rows(tmp_path) if 'loss' in r] == [9]


def test_resume_from_and_init_from_together_are_an_error(tmp_path):
    with pytest.raises(ValueError, match='set one of them'):
        train.train(tiny.config(init_from='a', resume_from='b'), tmp_path)


def test_fewer_images_than_a_batch_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match='64 images are fewer than one batch of 128'):
        train.train(tiny.config(batch_size=128), tmp_path)


def test_a_batch_that_does_not_split_over_the_devices_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match='use a multiple of 8'):
        train.train(tiny.config(batch_size=12), tmp_path)
