# SPDX-License-Identifier: Apache-2.0
"""What only real processes show: signals, two hosts over loopback, the compilation cache."""

import json
import re
import signal
import time

import numpy as np
import pytest

import tiny
from processes import commands, finish, no_process_outlives_its_test, start, twice  # noqa: F401
from ssl_jax import train
from ssl_jax.run import metrics, storage

RUN = """
    import tiny
    from ssl_jax import config, train
    config.recipe = lambda *_: tiny.config(compile_cache=True, {fields})
    train.command('tiny', [], {workdir!r})
"""


def run_code(workdir, fields=''):
    return RUN.format(workdir=str(workdir), fields=fields)


def rows(workdir):
    return [{k: v for k, v in r.items() if k != 'time'} for r in metrics.read(workdir)]


@pytest.mark.slow
def test_sigterm_saves_exits_0_and_the_restart_ends_as_an_unbroken_run(tmp_path):
    fields = 'total_steps=60, checkpoint__every_minutes=None'
    process, unbroken = (start(run_code(tmp_path / name, fields)) for name in 'ab')
    for line in process.stdout:
        if line.startswith('step 5/60'):
            process.send_signal(signal.SIGTERM)
            break
    code, out = finish(process)
    assert code == 0, out
    stopped = int(re.search(r'stopped on request at step (\d+)', out).group(1))
    assert 5 <= stopped < 60
    code, out = finish(start(run_code(tmp_path / 'a', fields)))
    assert code == 0 and f'continuing this run at step {stopped}' in out, out
    code, out = finish(unbroken)
    assert code == 0, out
    assert rows(tmp_path / 'a') == rows(tmp_path / 'b')


@pytest.mark.slow
def test_sigterm_while_compiling_exits_0_at_once(tmp_path):
    code = """
        import os, signal, threading, time
        import tiny
        from ssl_jax import config, train
        from ssl_jax.run import preempt
        real = preempt.run_interruptible

        def slow(fn, p):
            # Stands for a compilation of minutes; the signal comes while it runs.
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            return real(lambda: time.sleep(600), p)

        preempt.run_interruptible = slow
        config.recipe = lambda *_: tiny.config()
        train.command('tiny', [], {workdir!r})
    """
    code, out = finish(start(code.format(workdir=str(tmp_path))), timeout=120)
    assert code == 0 and 'stopped on request at step 0' in out, out


def test_sigterm_while_evaluating_saves_and_exits_0(tmp_path):
    code = """
        import os, signal
        import tiny
        from ssl_jax import config, train
        from ssl_jax.evals import features
        real = features.extract

        def signalled(*args, **kw):
            os.kill(os.getpid(), signal.SIGTERM)
            return real(*args, **kw)

        features.extract = signalled
        config.recipe = lambda *_: tiny.config(eval__every_steps=3)
        train.command('tiny', [], {workdir!r})
    """
    code, out = finish(start(code.format(workdir=str(tmp_path))), timeout=120)
    assert code == 0 and 'stopped on request at step 3' in out, out


def test_a_user_error_is_one_sentence_and_exit_code_1(tmp_path):
    code, out = finish(start(run_code(tmp_path, 'batch_size=128')))
    assert code == 1
    assert out.strip().splitlines()[-1].startswith('ssl_jax: 64 images are fewer than one batch')
    assert 'Traceback' not in out


COUNT_COMPILATIONS = """
    import jax, tiny
    from ssl_jax import train
    seen = []
    jax.monitoring.register_event_listener(lambda event, **kw: seen.append(event))
    config = tiny.config(compile_cache=True, total_steps=3, eval__tasks__monitors=None)
    train.train(config, {workdir!r})
    print('HITS', sum('compilation_cache/cache_hits' in event for event in seen))
"""


@pytest.mark.slow
def test_a_restart_does_not_compile_again(tmp_path):
    hits = []
    for workdir in ('first', 'second'):
        code = COUNT_COMPILATIONS.format(workdir=str(tmp_path / workdir))
        code, out = finish(start(code, SSL_JAX_CACHE=tmp_path / 'cache'))
        assert code == 0, out
        hits.append(int(out.split('HITS')[1]))
    assert hits[0] == 0 and hits[1] >= 2, hits  # the weights' program and the step's


KEEPS = """
    import jax
    from ssl_jax.run import launch
    launch.enable_compile_cache()
    print('KEEPS', jax.config.jax_compilation_cache_dir is not None)
"""


@pytest.mark.parametrize('devices, keeps', [(1, True), (2, False)])
def test_a_cpu_that_plays_several_devices_keeps_no_programs(tmp_path, devices, keeps):
    code, out = finish(start(KEEPS, devices, SSL_JAX_CACHE=tmp_path))
    assert code == 0 and f'KEEPS {keeps}' in out, out


TWO = """
    import json, os
    import jax
    from ssl_jax import train
    from ssl_jax.run import launch
    launch.initialize_distributed()
    import tiny
    config = tiny.config(compile_cache=True, checkpoint__every_steps=3, {fields})
    result = train.train(config, {workdir!r})
    print('RESULT', json.dumps([jax.process_count(), result['step'], result['preempted']]))
    jax.distributed.shutdown()
"""


def two_processes(workdir, fields='total_steps=6', *, each):
    """Starts a run on 2 processes x `each` devices over loopback."""
    return twice(TWO.format(workdir=str(workdir), fields=fields), each)


def test_two_processes_train_as_one_does_and_exchange_checkpoints(tmp_path):
    processes = two_processes(tmp_path / 'two', each=2)
    train.train(tiny.config(total_steps=6, checkpoint__every_steps=3), tmp_path / 'one')
    found = [finish(p) for p in processes]
    assert all(code == 0 for code, _ in found), found
    assert 'RESULT [2, 6, false]' in found[0][1]
    a, b = rows(tmp_path / 'one'), rows(tmp_path / 'two')
    assert [r['step'] for r in a] == [r['step'] for r in b]
    losses = np.array([[r['loss'] for r in x if 'loss' in r] for x in (a, b)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    # The run of two processes goes on in one, on another number of devices.
    code, out = finish(start(run_code(tmp_path / 'two', 'total_steps=8'), 2))
    assert code == 0 and 'continuing this run at step 6' in out, out


UPDATE = """
    import jax
    from ssl_jax.run import launch
    launch.initialize_distributed()
    import dataclasses
    import numpy as np
    import test_splitmask, tiny
    from ssl_jax import methods, sharding
    from ssl_jax.run import checksums, clock, trees

    mesh, size = sharding.make_mesh(fsdp=2), 16

    def spread(like, shardings, scale):
        # the same numbers in every process, without a program that makes them
        rng = np.random.default_rng(0)
        def one(x, s):
            x = (scale * rng.normal(size=x.shape)).astype(x.dtype)
            return jax.make_array_from_callback(x.shape, s, lambda i: x[i])
        return jax.tree.map(one, like, shardings)

    def weights(config):
        method = methods.make(config, clock.Clock.of(config))
        like = jax.eval_shape(method.init, jax.random.key(0))
        return method, spread(like, sharding.infer(like, mesh), 0.5)

    def crops(*shape):
        x = jax.ShapeDtypeStruct((size, *shape), np.float32)
        return spread(x, sharding.batch_sharding(mesh), 1.0)

    @jax.jit(out_shardings=sharding.replicated(mesh))
    def dinov2(params, extra, large, small, masks):
        grad = jax.value_and_grad(method.objective, has_aux=True)
        temps = (0.01, 0.01)  # the logits of such weights are alike
        (loss, (_, terms)), grads = grad(params, extra, large, small, masks > 0, temps=temps)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        extra = method.after_update(params, extra, 0)
        softmax = dataclasses.replace(method, centering='centering')
        found = {{**extra, 'dino_center': np.zeros((1, 64), np.float32)}}
        found.update(softmax.targets(found, large, None, temps)[1])
        center = softmax.with_centers(found)['dino_center']
        return dict(loss=loss, terms=terms, grads=grads, params=params, extra=extra, center=center)

    @jax.jit(out_shardings=sharding.replicated(mesh))
    def splitmask(params, extra, images):
        batch = dict(image=images, row=np.arange(size))
        extra = jax.tree.map(abs, extra)  # counts of words are not negative
        loss, (_, terms) = method.loss(params, extra, batch, jax.random.key(0), 0)
        return dict(loss=loss, terms=terms)

    with jax.set_mesh(mesh):
        method, (params, extra) = weights(
            tiny.dinov2(method__centering='sinkhorn_knopp', method__drop_path=0.0)
        )
        views = crops(2, 32, 32, 3), crops(2, 16, 16, 3), crops(2, 16)
        found = dict(dinov2=dinov2(params, extra, *views))
        # More programs than XLA on CPU takes at a time: deadlocked before `of` waited for some.
        kernel = params['backbone']['blocks']['mlp']['fc1']['kernel']
        assert len(set(checksums.of([kernel] * 64).values())) == 1
        method, (params, extra) = weights(test_splitmask.config())
        found['splitmask'] = splitmask(params, extra, crops(1, 32, 32, 3))
    if jax.process_index() == 0:
        np.savez({file!r}, **trees.named(found))
    if jax.process_count() > 1:
        jax.distributed.shutdown()
"""


@pytest.mark.slow
def test_loss_and_update_on_two_processes_are_those_of_one(tmp_path):
    files = [tmp_path / f'{n}.npz' for n in (1, 2)]
    processes = [start(UPDATE.format(file=str(files[0])), 4)]
    processes += twice(UPDATE.format(file=str(files[1])), 2)
    for code, out in map(finish, processes):
        assert code == 0, out
    one, two = (dict(np.load(f)) for f in files)
    assert one.keys() == two.keys() and {'dinov2/terms/koleo', 'splitmask/terms/nce'} < one.keys()
    assert one['dinov2/terms/teacher_entropy'] < np.log(64) - 0.1  # not uniform targets
    for name, want in one.items():
        assert np.isfinite(want).all(), name
        # Losses to their own size, entries of a tensor to its largest. Gradients are sums in which
        # most cancels, added up in another order.
        scale = np.abs(want).max() or 1.0
        atol = 1e-5 if '/grads/' in name else 1e-6
        np.testing.assert_allclose(two[name] / scale, want / scale, 0, atol, err_msg=name)


@pytest.mark.slow
def test_too_many_bad_images_of_one_process_end_both(tmp_path):
    found = commands(tmp_path, 1, "raise stream.TooManyBadImages('9 images cannot be decoded.')")
    assert [code for code, _ in found] == [1, 1], found
    assert found[1][1].endswith('\nssl_jax: 9 images cannot be decoded.\n')
    text = '\nssl_jax: process 1 ended (step 3): 9 images cannot be decoded.\n'
    assert found[0][1].endswith(text), found


def test_configs_that_differ_are_found_before_the_first_step(tmp_path):
    found = commands(tmp_path, fields="batch_size=8 * (1 + int(os.environ['JAX_PROCESS_ID']))")
    assert [code for code, _ in found] == [1, 1], found
    text = 'process 1 has batch_size=16 and process 0 has 8: start all processes with the same'
    assert all(text in out and 'compiled' not in out for _, out in found), found


LEASE = """
    from ssl_jax.run import launch, workdir
    launch.initialize_distributed()
    workdir.STALE_SECONDS, workdir.WATCH_SECONDS, workdir.POLL_SECONDS = {stale}, 1, 0.1
    with workdir.lock({workdir!r}) as held:
        held()
        print('locked', flush=True)
    launch.leave()
"""


@pytest.mark.slow
@pytest.mark.parametrize('stale', [2, 600])
def test_two_processes_wait_together_for_a_lease_or_are_refused(bucket, stale):
    path = f'{bucket.root}/run.lock'
    holder = {'host': 'far-away', 'pid': 7, 'started': '2026-01-02 03:04:05 UTC'}
    storage.atomic_write(path, json.dumps(holder))
    processes = twice(LEASE.format(workdir=bucket.root, stale=stale), 1)
    while stale == 600 and any(p.poll() is None for p in processes):  # the other run answers
        storage.atomic_write(path, json.dumps({**holder, 'beat': time.monotonic()}))
        time.sleep(1)
    found = [finish(p) for p in processes]
    if stale == 600:
        assert [code for code, _ in found] == [1, 1] and 'in use by process 7' in found[0][1]
    else:
        assert [code for code, _ in found] == [0, 0], found
        assert all(out.count('locked') == 1 for _, out in found)
        assert found[0][1].count('this run starts in') == 1


@pytest.mark.slow
@pytest.mark.parametrize('name', ['SIGHUP', 'SIGINT'])
@pytest.mark.parametrize('who', [0, 1])
def test_a_signal_to_one_of_two_processes_ends_both_with_a_checkpoint(tmp_path, who, name):
    found = commands(tmp_path, who, f'os.kill(os.getpid(), signal.{name})')
    assert [code for code, _ in found] == [0, 0], found
    step = re.search(r'stopped on request at step (\d+)', found[0][1]).group(1)
    assert (tmp_path / 'checkpoints' / step).exists()
