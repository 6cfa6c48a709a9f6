# SPDX-License-Identifier: Apache-2.0
"""SplitMask: the split, both losses, its symmetries, the codebook in the loop, restarts."""

import contextlib
import dataclasses
import itertools
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from ssl_jax import config as config_lib
from ssl_jax import methods, sharding, train
from ssl_jax import step as step_lib
from ssl_jax.methods import base, beit, splitmask
from ssl_jax.models import blocks
from ssl_jax.models import patches as patches_lib
from ssl_jax.objectives import losses
from ssl_jax.objectives import words as words_lib
from ssl_jax.run import clock as clock_lib
from ssl_jax.run import metrics, weights


def config(name='splitmask', **fields):
    """A tiny run on 64 rendered scenes of 4x4 patches, 40 words; fields as in `tiny.config`."""
    c = tiny.base(name)
    c.method.update(drop_path=0.2, vocab=40, min_perplexity=5.0)
    if name == 'splitmask':
        c.method.decoder_depth = 1
    config_lib.shared('words').optim(c.optim)
    c.optim.lr = 1e-3
    return tiny.changed(c, fields)


def build(**fields):
    """(method, params, extra) with seeded weights."""
    method = methods.make(config(**{f'method__{k}': v for k, v in fields.items()}))
    return method, *jax.jit(method.init)(jax.random.key(0))


def pictures(n=6, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 1, 32, 32, 3)).astype(np.uint8)


def inputs(method, n=6):
    """Normalised images, the two branches and words of all patches."""
    rng = np.random.default_rng(1)
    images = jnp.asarray(rng.normal(size=(n, 32, 32, 3)), jnp.float32)
    perm = method.permutation(jax.random.split(jax.random.key(3), n))
    words = jnp.asarray(rng.integers(0, 40, (n, method.num_patches)), jnp.int32)
    return images, [splitmask.branch(perm, *r) for r in method.ranges], words


# InfoNCE


def test_infonce_of_the_identity_is_known():
    loss, hits = losses.info_nce(jnp.eye(4), jnp.eye(4), 0.2)
    assert float(loss) == pytest.approx(math.log((math.exp(5) + 3) / math.exp(5)), rel=1e-5)
    assert float(loss) == pytest.approx(0.02001, abs=1e-5) and float(hits) == 1


def test_infonce_of_equal_rows_is_log_of_the_batch():
    x = jnp.ones((6, 5))
    assert float(losses.info_nce(x, x)[0]) == pytest.approx(math.log(6), rel=1e-6)


def test_infonce_equals_its_formula_whatever_the_lengths_of_the_descriptors():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 7))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)]
    logits = unit[0] @ unit[1].T / 0.5
    want = -np.mean(
        [np.log(np.exp(np.diag(x)) / np.exp(x).sum(axis=1)) for x in (logits, logits.T)]
    )
    loss, _ = losses.info_nce(a, b, 0.5)
    assert float(loss) == pytest.approx(want, rel=1e-5)
    scaled = losses.info_nce(3 * a, 0.1 * b)[0]
    assert float(scaled) == pytest.approx(float(losses.info_nce(a, b)[0]), rel=1e-5)


def test_infonce_ignores_the_order_of_branches_and_images():
    a, b = jax.random.normal(jax.random.key(0), (2, 8, 6))
    order = jnp.asarray([3, 1, 7, 0, 2, 6, 5, 4])
    loss = float(losses.info_nce(a, b)[0])
    assert loss == pytest.approx(float(losses.info_nce(b, a)[0]), rel=1e-6)
    assert loss == pytest.approx(float(losses.info_nce(a[order], b[order])[0]), rel=1e-6)


def test_infonce_of_one_image_is_refused():
    with pytest.raises(ValueError, match='compares images with each other: pass 2 or more, not 1'):
        losses.info_nce(jnp.ones((1, 6)), jnp.ones((1, 6)))


def test_infonce_sends_gradient_into_both_branches():
    a, b = jax.random.normal(jax.random.key(0), (2, 4, 6))
    grads = jax.grad(lambda a, b: losses.info_nce(a, b)[0], (0, 1))(a, b)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 1e-3 for g in grads)


# The split

KINDS = {
    'block': dict(),
    'uniform disjoint': dict(split='uniform', split_ratio=0.75, split_complement=False),
    'uniform complement': dict(split='uniform', split_ratio=0.75),
}


def permutations(kind, n=200):
    method = methods.make(
        config(method__img_size=112, **{f'method__{k}': v for k, v in KINDS[kind].items()})
    )
    perm = jax.jit(method.permutation)(jax.random.split(jax.random.key(0), n))
    return method, np.asarray(perm)


@pytest.mark.parametrize('kind', KINDS)
def test_both_branches_come_back_in_raster_order_on_200_splits(kind):
    method, perm = permutations(kind)
    for start, count in method.ranges:
        part = splitmask.branch(jnp.asarray(perm), start, count)
        sequence = np.concatenate([part.visible, part.missing], axis=1)
        raster = np.take_along_axis(sequence, np.asarray(part.restore), axis=1)
        np.testing.assert_array_equal(raster, np.broadcast_to(np.arange(196), raster.shape))


@pytest.mark.parametrize(
    ('kind', 'counts'),
    [('block', (98, 98)), ('uniform disjoint', (49, 49)), ('uniform complement', (49, 147))],
)
def test_branches_are_disjoint_ascending_and_of_exact_size(kind, counts):
    method, perm = permutations(kind)
    assert tuple(count for _, count in method.ranges) == counts
    first, second = (perm[:, s : s + k] for s, k in method.ranges)
    assert (np.diff(first) > 0).all() and (np.diff(second) > 0).all()
    np.testing.assert_array_equal(np.sort(perm, axis=1), np.arange(196) + 0 * perm)
    assert len({tuple(row) for row in first}) == len(first)


def test_blocks_hang_together_and_uniform_patches_do_not():
    def borders(kind):
        method, perm = permutations(kind)
        hidden = np.ones((len(perm), 196))
        np.put_along_axis(hidden, perm[:, : method.ranges[0][1]], 0, axis=1)
        return np.abs(np.diff(hidden.reshape(-1, 14, 14), axis=2)).mean()

    assert borders('block') < 0.35 < borders('uniform complement')


@pytest.mark.parametrize(('size', 'least', 'most'), [(112, 16, 75), (64, 5, 24), (32, 1, 6)])
def test_blocks_are_in_proportion_to_the_grid(size, least, most):
    method = methods.make(config(method__img_size=size))
    assert (method.on_grid(beit.MIN_BLOCK), method.on_grid(beit.MAX_BLOCK)) == (least, most)


# What the networks see


def test_a_branch_sees_its_own_patches_only():
    method, params, _ = build()
    images, parts, _ = inputs(method)
    run = jax.jit(lambda x: method.forward(params, x, parts))
    outs = run(images)
    patches = patches_lib.patchify(images, 8)
    other = jax.vmap(lambda p, ids: p.at[ids].add(1.0))(patches, parts[0].missing)
    changed = run(patches_lib.unpatchify(other, method.grid, 8))
    np.testing.assert_array_equal(outs[0], changed[0])
    assert np.abs(np.asarray(outs[1] - changed[1])).max() > 1e-3


def test_stacked_branches_equal_one_branch_after_the_other():
    method, params, _ = build()
    images, parts, _ = inputs(method)
    outs = jax.jit(method.forward)(params, images, parts)
    alone = jax.jit(lambda part: method._one(params, images, part, None))
    for out, part in zip(outs, parts, strict=True):
        np.testing.assert_allclose(out, alone(part), atol=2e-5)
    assert outs[0].shape == (6, 1 + 16, 32)


def test_decoder_positions_belong_to_the_mask_embeddings():
    method, params, _ = build()
    images, parts, _ = inputs(method, 1)
    cotangent = jax.random.normal(jax.random.key(9), (17, 32))
    total = jax.jit(jax.grad(lambda p: (method.forward(p, images, parts)[0] * cotangent).sum()))
    grads = total(params)
    moved = np.abs(np.asarray(grads['decoder']['decoder_pos_embed'][0])).max(axis=1) > 0
    hidden = np.isin(np.arange(16), np.asarray(parts[0].missing[0]))
    np.testing.assert_array_equal(moved, hidden)


def test_the_total_ignores_the_order_of_branches_and_of_images():
    method, params, _ = build()
    images, parts, words = inputs(method)
    run = jax.jit(method.objective)
    total, terms = run(params, images, parts, words)
    swapped = run(params, images, parts[::-1], words)[0]
    order = jnp.asarray([4, 2, 0, 5, 1, 3])
    permuted = run(params, *jax.tree.map(lambda x: x[order], (images, parts, words)))[0]
    assert float(total) == pytest.approx(float(terms['mim'] + terms['nce']), rel=1e-6)
    assert float(total) == pytest.approx(float(swapped), rel=1e-5)
    assert float(total) == pytest.approx(float(permuted), rel=1e-5)


def test_words_of_all_missing_patches_of_both_branches_are_predicted():
    """A head that knows nothing pays ln V; one that has learned one word pays for the others."""
    method, params, _ = build()
    images, parts, words = inputs(method)
    head = jax.tree.map(jnp.zeros_like, params['head'])
    _, terms = method.objective({**params, 'head': head}, images, parts, words)
    assert float(terms['mim']) == pytest.approx(math.log(40), rel=1e-6)
    sure = {**head, 'bias': head['bias'].at[7].set(100.0)}
    _, terms = method.objective({**params, 'head': sure}, images, parts, words)
    assert float(terms['mim']) == pytest.approx(100 * float((words != 7).mean()), rel=1e-5)


def test_a_branch_predicts_what_it_does_not_see():
    """Decoders that say 1 at missing and 0 at visible patches; the head makes word 7 of a 1."""

    class Told(splitmask.SplitMask):
        def forward(self, params, images, parts, drop_keys=None):
            missing = [(part.restore >= part.visible.shape[1])[..., None] for part in parts]
            return [jnp.pad(m * jnp.ones(32), ((0, 0), (1, 0), (0, 0))) for m in missing]

    method, params, _ = build(**KINDS['uniform disjoint'])
    told = Told(**{f.name: getattr(method, f.name) for f in dataclasses.fields(method)})
    images, parts, words = inputs(method)
    head = {'kernel': jnp.zeros((32, 40)).at[:, 7].set(1.0), 'bias': jnp.zeros(40)}
    _, terms = told.objective({**params, 'head': head}, images, parts, 0 * words + 7)
    assert float(terms['mim']) < 1e-6
    assert float(terms['mim_acc']) == pytest.approx(1)


@pytest.mark.parametrize(
    'fields',
    [
        KINDS['block'],
        pytest.param(KINDS['uniform disjoint'], marks=pytest.mark.slow),
        pytest.param(dict(KINDS['uniform complement'], tokenizer='pixel'), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_option_trains_every_parameter(fields):
    method, params, extra = build(**fields)
    batch = {'image': pictures(4), 'row': jnp.arange(4)}

    @jax.jit
    def run(params):
        return jax.value_and_grad(method.loss, has_aux=True)(
            params, extra, batch, jax.random.key(1), 0
        )

    (loss, (_, terms)), grads = run(params)
    assert np.isfinite(loss) and {'mim', 'nce', 'nce_acc'} <= set(terms)
    # Keys have a bias in the middle third of qkv that no softmax sees.
    dead = [k for k, g in jax.tree_util.tree_leaves_with_path(grads) if not np.any(g)]
    assert not dead, dead


def test_match_only_and_inpaint_only_leave_the_other_loss_out():
    batch = {'image': pictures(4), 'row': jnp.arange(4)}
    for off, gone, kept in (('w_mim', 'mim', 'nce'), ('w_nce', 'nce', 'mim')):
        method, params, extra = build(**{off: 0.0})
        loss, (_, terms) = jax.jit(method.loss)(params, extra, batch, jax.random.key(1), 0)
        assert gone not in terms
        assert float(loss) == pytest.approx(float(terms[kept]), rel=1e-6)
        assert 'token_perplexity' in terms


def test_what_is_learned_is_how_far_the_loss_is_below_the_unigram():
    method, params, extra = build()
    batch = {'image': pictures(4), 'row': jnp.arange(4)}
    _, (new, terms) = jax.jit(method.loss)(params, extra, batch, jax.random.key(1), 0)
    entropy = float(terms['token_unigram'])
    assert float(terms['mim_gain']) == pytest.approx(entropy - float(terms['mim']), abs=1e-5)
    assert float(new['word_frequency'].sum()) == pytest.approx(0.01, rel=1e-4)


def test_too_few_words_in_use_are_named():
    method, *_ = build()
    assert method.suspect({'token_perplexity': 30.0}, 5) is None
    assert 'perplexity of 3.0, below' in method.suspect({'token_perplexity': 3.0}, 5)


# In the loop


def losses_on(devices, steps=2, **mesh):
    c = config()
    clock = clock_lib.Clock.of(c)
    method = methods.make(c, clock)
    mesh = sharding.make_mesh(**mesh, devices=jax.devices()[:devices])
    program = step_lib.make_program(c, method, mesh)
    rows = sharding.process_rows(mesh, c.batch_size)
    found = []
    with jax.set_mesh(mesh):
        state = program.init()
        for step in range(steps):
            batch = {'image': pictures(16, seed=step)}
            state, m = program.step(state, sharding.to_global(batch, mesh, rows, 16))
            found.append([float(m[k]) for k in ('loss', 'mim', 'nce', 'token_perplexity')])
    return np.array(found)


@pytest.mark.slow
def test_the_loss_is_equal_on_any_mesh():
    one, many = losses_on(1), losses_on(8, data=2, fsdp=2, tensor=2)
    np.testing.assert_allclose(many[0], one[0], rtol=2e-6)
    np.testing.assert_allclose(many, one, rtol=1e-4)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The workdir of a run of 4 steps that has kept those of step 2."""
    workdir = tmp_path_factory.mktemp('splitmask') / 'whole'
    train.train(config(total_steps=4, checkpoint__every_steps=2), workdir)
    return workdir


def without_words_of_its_own(monkeypatch):
    def forbidden(*_):
        raise AssertionError('the words were made again')

    monkeypatch.setattr(words_lib, 'fit', forbidden)


@pytest.mark.slow
def test_a_restart_ends_on_the_same_bits_and_keeps_its_words(whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / 'killed')
    shutil.rmtree(tmp_path / 'killed' / 'checkpoints' / '4')
    without_words_of_its_own(monkeypatch)
    train.train(config(total_steps=4, checkpoint__every_steps=2), tmp_path / 'killed')
    first, second = (weights.open_run(path) for path in (whole, tmp_path / 'killed'))
    assert float(first.extra['prepared']) == 1
    for a, b in zip(
        jax.tree.leaves((first.params, first.extra)),
        jax.tree.leaves((second.params, second.extra)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    rows = [
        [r['loss'] for r in metrics.read(path) if 'loss' in r]
        for path in (whole, tmp_path / 'killed')
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 4


def beginning():
    """What `prepare` may look at before step 0."""

    def batches():
        return contextlib.nullcontext({'image': pictures(16, seed)} for seed in itertools.count())

    return base.Start(seed=0, fetch=jax.device_get, batches=batches, open=None, tensors=None)


def test_words_come_from_the_training_images(whole):
    method = methods.make(config())
    fresh = jax.jit(method.init)(jax.random.key(0))[1]
    extra, lines = method.prepare(fresh, beginning())
    book = extra['codebook']['vectors']
    patches = words_lib.patches(method.tok, pictures(16, 0)[:, 0] / 255.0)
    near = jnp.einsum('bnd,vd->vbn', blocks.l2_normalize(patches), book).max(axis=(1, 2))
    assert int((near > 0.9999).sum()) == 16  # one word of each image of the first batch
    assert 'perplexity' in lines[0] and float(extra['prepared']) == 1
    assert float(extra['word_frequency'].sum()) == pytest.approx(1, rel=1e-5)
    saved = weights.open_run(whole).extra['codebook']['vectors']
    assert np.abs(saved - fresh['codebook']['vectors']).max() > 0.01


def test_a_run_that_continues_from_another_has_its_words(whole, tmp_path, monkeypatch):
    without_words_of_its_own(monkeypatch)
    train.train(config(total_steps=4, init_from=str(whole)), tmp_path)
    a, b = (weights.open_run(path).extra['codebook']['vectors'] for path in (whole, tmp_path))
    np.testing.assert_array_equal(a, b)


def test_a_run_with_poor_words_is_refused_before_it_begins(tmp_path):
    poor = dict(method__tokenizer='random_projection', method__min_perplexity=38.0)
    with pytest.raises(ValueError, match='min_perplexity=38: set method.tokenizer=random_patches'):
        train.train(config(**poor), tmp_path)
    assert not (tmp_path / 'checkpoints').exists()


def test_poor_words_are_taken_where_the_config_says_so():
    method, _, extra = build(tokenizer='random_projection', min_perplexity=0.0)
    after, lines = method.prepare(extra, beginning())
    np.testing.assert_array_equal(after['codebook']['vectors'], extra['codebook']['vectors'])
    assert 'random_projection' in lines[0]


@pytest.mark.parametrize('name', ['splitmask', pytest.param('beit', marks=pytest.mark.slow)])
def test_a_sample_draws_by_its_row_whatever_batch_it_is_in(name):
    """Without InfoNCE, whose negatives are the other images, losses of halves average."""
    alone = dict(method__w_nce=0.0) if name == 'splitmask' else {}
    method = methods.make(config(name, **alone))
    params, extra = jax.jit(method.init)(jax.random.key(0))
    batch = {'image': pictures(8), 'row': jnp.arange(8)}
    run = jax.jit(lambda batch: method.loss(params, extra, batch, jax.random.key(1), 0)[0])
    halves = [run({k: v[i::2] for k, v in batch.items()}) for i in (0, 1)]
    assert float(run(batch)) == pytest.approx(float(sum(halves) / 2), rel=1e-5)


def test_beit_masks_its_share_and_pays_for_masked_patches_only():
    method = methods.make(config('beit', method__tokenizer='pixel', method__drop_path=0.0))
    assert method.target == 6  # 75 of 196 patches, of 16
    params, _ = jax.jit(method.init)(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    mask = jnp.asarray([[True] * 6 + [False] * 10, [False, True] * 2 + [False] * 12])
    targets = jax.random.normal(jax.random.key(2), (2, 16, 192))
    run = jax.jit(lambda targets: method.objective(params, images, mask, targets)[0])
    elsewhere = jnp.where(mask[..., None], targets, targets + 1)
    assert float(run(targets)) == float(run(elsewhere))
    moved = jnp.where(mask[..., None], targets + 100, targets)
    assert float(run(moved)) == pytest.approx(100**2, rel=0.1)


# Configuration


@pytest.mark.parametrize(
    ('fields', 'says'),
    [
        (dict(method__split='blocks'), "method.split='blocks' is unknown: use one of block"),
        (dict(method__tokenizer='vqgan'), "method.tokenizer='vqgan' is unknown"),
        (dict(method__split_complement=False), "needs method.split='uniform'"),
        (dict(method__w_mim=0.0, method__w_nce=0.0), 'nothing is learned: set w_mim=1'),
        (dict(batch_size=1), 'compares the images of a micro-batch: set batch_size to 2 or more'),
        (dict(accum_steps=16), 'compares the images of a micro-batch: set batch_size to 2 or more'),
        (dict(method__min_perplexity=-1.0), 'method.min_perplexity=-1.0 is out of range'),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_one_sentence(fields, says):
    with pytest.raises(ValueError) as error:
        config_lib.validate(config(**fields))
    assert says in str(error.value)


def test_a_dvae_without_weights_is_refused():
    with pytest.raises(ValueError, match='set method.dvae to the state dict'):
        config_lib.validate(config(method__tokenizer='dvae'))


@pytest.mark.parametrize(
    ('images', 'epochs'), [(1_281_167, 300), (437_513, 878.5), (75_750, 5000), (8_144, 5000)]
)
def test_the_length_is_that_of_300_imagenet_epochs_at_most_5000(images, epochs):
    assert config_lib.shared('words').epochs(images) == pytest.approx(epochs, rel=1e-4)
    assert config_lib.shared('words').epochs(20_210, most=math.inf) == pytest.approx(
        19_018, rel=1e-4
    )
