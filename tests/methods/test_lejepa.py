# SPDX-License-Identifier: Apache-2.0
"""LeJEPA: devices agree, statistics are of the batch, collapses have names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from ssl_jax import config as config_lib
from ssl_jax import methods, sharding, train
from ssl_jax import step as step_lib
from ssl_jax.interop import export
from ssl_jax.models import heads
from ssl_jax.run import clock as clock_lib
from ssl_jax.run import metrics, trees, weights

PLAIN = ('jitter_prob', 'grey_prob', 'blur_prob', 'solarize_prob')  # they compile for long


def config(**fields):
    """Two blocks, two local crops, no photometry; fields as a__b=value."""
    c = tiny.base('lejepa')
    config_lib.shared('lejepa').small(c.method)
    c.method.update(local_size=16, n_local_crops=2, drop_path=0.2, **dict.fromkeys(PLAIN, 0.0))
    c.method.update(num_slices=16, proj_dim=8, proj_hidden_dim=32)
    c.eval.tasks.monitors = None
    return tiny.changed(c, fields)


def crops(method, size, seed=0):
    rng = np.random.default_rng(seed)
    return {
        v.name: rng.integers(0, 256, (size, v.count, v.size, v.size, 3)).astype(np.uint8)
        for v in method.views()
    }


class Small:
    """A method, its parameters, a batch, and its loss with gradients, compiled once."""

    def __init__(self):
        self.method = methods.make(config(), clock_lib.Clock(100, 10))
        self.params, self.extra = jax.jit(self.method.init)(jax.random.key(0))
        self.batch = {**crops(self.method, 16), 'row': np.arange(16, dtype=np.int32)}
        self.fn = jax.jit(jax.value_and_grad(self.method.loss, has_aux=True))

    def run(self, batch, seed=1):
        (loss, (changes, terms)), grads = self.fn(
            self.params, self.extra, batch, jax.random.key(seed), 0
        )
        return float(loss), changes, jax.tree.map(float, terms), jax.device_get(grads)


@pytest.fixture(scope='module')
def small():
    return Small()


@pytest.fixture(scope='module')
def one_device(small):
    return small.run(small.batch)


@pytest.mark.slow
def test_loss_and_gradients_are_equal_on_one_device_and_on_eight(small, one_device):
    mesh = sharding.make_mesh(data=8)
    batch = sharding.to_global(small.batch, mesh, np.arange(16), 16)
    with jax.set_mesh(mesh):
        loss, _, _, grads = small.run(batch)
    assert loss == pytest.approx(one_device[0], rel=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(one_device[3]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_loss_is_the_weighed_sum_of_its_terms_and_every_parameter_has_a_gradient(one_device):
    loss, changes, terms, grads = one_device
    assert loss == pytest.approx(0.95 * terms['invariance'] + 0.05 * terms['sigreg'], rel=1e-5)
    assert changes == {} and set(terms) == {
        'invariance', 'sigreg', 'embedding_std', 'embedding_rank'
    }  # fmt: skip
    assert all(np.any(g) for g in jax.tree.leaves(grads))


def test_the_order_of_the_images_does_not_matter(small, one_device):
    """Random directions are of the step; flips and dropped images go with the row."""
    order = np.random.default_rng(0).permutation(16)
    moved = small.run(jax.tree.map(lambda x: x[order], small.batch))
    assert moved[0] == pytest.approx(one_device[0], rel=1e-5)


def test_the_directions_are_new_at_each_step(small, one_device):
    assert small.run(small.batch, seed=2)[2]['sigreg'] != one_device[2]['sigreg']


def test_the_projector_normalises_by_the_batch_between_three_layers():
    head = heads.BatchNormMLP(3, hidden_dim=4, in_dim=5)
    x = np.random.default_rng(0).normal(size=(6, 2, 7)).astype(np.float32)
    params = jax.jit(head.init)(jax.random.key(0), x)['params']
    params = jax.tree.map(lambda p: np.asarray(p) + np.float32(0.1), params)
    p = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    y = x.reshape(12, 7) @ p['input']['kernel']
    for i in range(2):
        y = y @ p[f'mlp_{i}']['kernel']
        y = (y - y.mean(axis=0)) / np.sqrt(y.var(axis=0) + 1e-5)
        y = np.maximum(y * p[f'norm_{i}']['scale'] + p[f'norm_{i}']['bias'], 0)
    want = (y @ p['output']['kernel'] + p['output']['bias']).reshape(6, 2, 3)
    np.testing.assert_allclose(jax.jit(head.apply)({'params': params}, x), want, atol=1e-5)
    assert head.flops_per_token(7) == 2 * sum(k['kernel'].size for k in p.values() if 'kernel' in k)
    assert 'input' not in jax.eval_shape(head.init, jax.random.key(0), x[..., :5])['params']


@pytest.mark.parametrize('regularizer', ['sigreg', 'visreg'])
def test_the_regularizer_is_the_one_asked_for(regularizer):
    method = methods.make(config(method__regularizer=regularizer, method__sigreg_weight=0.5))
    z = jax.random.normal(jax.random.key(0), (4, 6, 8))
    loss, terms = jax.jit(method.objective)(z, jnp.eye(8))
    parts = {'sigreg': ('sigreg',), 'visreg': ('scale', 'centre', 'shape')}[regularizer]
    assert set(terms) == {'invariance', *parts}
    assert float(loss) == pytest.approx(0.5 * sum(map(float, terms.values())), rel=1e-6)


def test_a_collapse_is_named_once_the_warm_up_is_over(small):
    sick = dict(embedding_std=0.01, embedding_rank=3.0)
    assert small.method.suspect(sick, 9) is None and small.method.suspect({}, 10) is None
    assert 'Collapse to a point' in small.method.suspect(sick, 10)


@pytest.mark.slow
def test_a_run_without_the_regularizer_collapses_and_says_so(tmp_path, capsys):
    short = dict(total_steps=60, warmup_steps=5, optim__lr=5e-3)
    train.train(config(method__sigreg_weight=0.0, **short), tmp_path / 'without')
    assert 'Collapse to a point suspected' in capsys.readouterr().out
    train.train(config(**short), tmp_path / 'with')
    assert 'Collapse to a point suspected' not in capsys.readouterr().out
    last = [
        next(r for r in metrics.read(tmp_path / name) if r.get('step') == 60 and 'loss' in r)
        for name in ('without', 'with')
    ]
    assert last[0]['loss'] < last[1]['loss']  # the loss alone looks like success
    assert last[0]['embedding_std'] < 0.1 * last[1]['embedding_std']


@pytest.mark.slow
@pytest.mark.parametrize('regularizer', ['sigreg', 'visreg'])
def test_two_steps_with_photometry_are_equal_on_any_mesh(regularizer):
    fields = dict(method__regularizer=regularizer, optim__lr=1e-4)
    c = config(**fields, **{f'method__{name}': 0.5 for name in PLAIN})
    method = methods.make(c, clock_lib.Clock.of(c))
    found = []
    for devices, mesh in ((1, {}), (8, dict(data=2, fsdp=4))):
        mesh = sharding.make_mesh(**mesh, devices=jax.devices()[:devices])
        program = step_lib.make_program(c, method, mesh)
        with jax.set_mesh(mesh):
            state, values = program.init(), []
            for step in range(2):
                batch = sharding.to_global(crops(method, 16, step), mesh, np.arange(16), 16)
                state, m = program.step(state, batch)
                values.append([float(m[k]) for k in ('loss', 'invariance', 'grad_norm')])
            found.append((values, jax.device_get(state.params)))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-4)
    one, eight = (trees.named(params) for _, params in found)
    # Biases whose gradient is rounding noise: the softmax cancels that of keys, BatchNorm the last.
    noise = ('encoder/blocks/attn/qkv/bias', 'encoder/norm/bias')
    assert set(noise) < set(one)
    for name, value in one.items():
        if name not in noise:
            np.testing.assert_allclose(eight[name], value, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    ('method', 'fields', 'terms'),
    [
        ('lejepa', {}, 'SIGReg and BatchNorm'),
        ('lejepa', dict(method__regularizer='visreg'), 'VISReg and BatchNorm'),
        ('dinov2', dict(method__centering='sinkhorn_knopp'), 'Sinkhorn-Knopp and KoLeo'),
        ('dinov2', dict(method__centering='sinkhorn_knopp', method__koleo_weight=0.0),
         'Sinkhorn-Knopp'),
        ('dinov2', dict(method__koleo_weight=0.0), None),
    ],
)  # fmt: skip
def test_accumulation_says_which_terms_see_a_micro_batch(method, fields, terms):
    made = methods.make({'lejepa': config, 'dinov2': tiny.dinov2}[method](**fields))
    assert list(made.warnings(16, 1)) == []
    said = list(made.warnings(batch_size=16, ways=1, accum_steps=4))
    assert len(said) == (terms is not None)
    for line in said:
        assert line.startswith('accum_steps=4: the 16 images of a micro-batch, not the 64 of a ')
        assert f'are compared by {terms},' in line


@pytest.mark.parametrize(
    ('fields', 'says'),
    [
        (dict(batch_size=4, accum_steps=4), 'use batch_size=512'),
        (dict(method__local_size=20), 'method.local_size=20 is not a multiple'),
        (dict(method__regularizer='vicreg'), "method.regularizer='vicreg' is unknown: use one of"),
        (dict(method__sigreg_weight=1.5), 'method.sigreg_weight=1.5 is out of range'),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_one_sentence(fields, says):
    with pytest.raises(ValueError) as error:
        config_lib.validate(config(**fields))
    assert says in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize('layout', ['hf', 'timm'])
def test_the_encoder_leaves_as_a_plain_vit(tmp_path, layout):
    params = tiny.save(config(), tmp_path / 'run')
    vit = methods.make(config()).vit
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    want = vit.apply({'params': params['encoder']}, images)
    torch = pytest.importorskip('torch')
    export.export(weights.open_run(tmp_path / 'run'), layout, tmp_path / 'out')
    pixels = torch.tensor(images.transpose(0, 3, 1, 2))
    if layout == 'hf':
        transformers = pytest.importorskip('transformers')
        model = transformers.ViTModel.from_pretrained(tmp_path / 'out', add_pooling_layer=False)
        got = model.eval()(pixels).last_hidden_state
    else:
        timm = pytest.importorskip('timm', exc_type=ImportError)
        model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
        got = model.eval().forward_features(pixels)
    got = got.detach().numpy()
    np.testing.assert_allclose(got[:, :1], want['cls_tokens'], atol=2e-5)
    np.testing.assert_allclose(got[:, 1:], want['patch_tokens'], atol=2e-5)
