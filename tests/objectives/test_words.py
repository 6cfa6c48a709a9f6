# SPDX-License-Identifier: Apache-2.0
"""Visual words: who gets which, how well a codebook is used, and what is refused."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.augment import photometry
from ssl_jax.data import host, sources
from ssl_jax.models import blocks
from ssl_jax.objectives import words as words_lib
from ssl_jax.objectives.words import Tokenizer

SMALL = dict(vocab=48, image_patch=4, patch=4)


def pictures(n=8, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3)).astype(np.uint8)


def batches(**kw):
    return (pictures(seed=i, **kw) for i in itertools.count())


def test_a_word_is_the_codebook_vector_of_largest_cosine():
    tok = Tokenizer('random_projection', **SMALL)
    book = words_lib.init(tok, jax.random.key(0))
    x = pictures() / 255.0
    words = words_lib.tokens(tok, book, x)
    assert words.shape == (8, 16) and words.dtype == jnp.int32
    unit = blocks.l2_normalize(words_lib.patches(tok, x))
    cosine = np.einsum('bnd,vd->bnv', unit, book['vectors'])
    np.testing.assert_array_equal(words, cosine.argmax(axis=-1))
    np.testing.assert_allclose(np.linalg.norm(book['vectors'], axis=1), 1, rtol=1e-6)


def test_comparing_words_in_chunks_gives_the_same_words(monkeypatch):
    rng = np.random.default_rng(0)
    vectors, x = (rng.normal(size=s).astype(np.float32) for s in ((64, 12), (5, 7, 12)))
    whole = words_lib.nearest(vectors, x)
    monkeypatch.setattr(words_lib, 'CHUNK', 16)
    np.testing.assert_array_equal(words_lib.nearest(vectors, x), whole)
    twice = np.concatenate([vectors, vectors])  # of equals the first
    np.testing.assert_array_equal(words_lib.nearest(twice, x), whole)


def test_no_gradient_flows_through_words():
    tok = Tokenizer('random_projection', **SMALL)
    book = words_lib.init(tok, jax.random.key(0))
    x = jnp.asarray(pictures(2) / 255.0)
    grads = jax.grad(lambda b: words_lib.tokens(tok, b, x).astype(jnp.float32).sum())(book)
    assert not np.any(grads['vectors'])


def test_the_tokenizer_sees_means_of_pixels_aligned_with_the_patches():
    tok = Tokenizer('random_patches', image_patch=16, patch=8)
    x = pictures(1, 32) / 255.0
    found = words_lib.patches(tok, x)
    assert found.shape == (1, 4, 192)
    second = x[0, :16, 16:].reshape(8, 2, 8, 2, 3).mean(axis=(1, 3))  # the patch to the right
    second = (second - photometry.MEAN) / photometry.STD
    np.testing.assert_allclose(found[0, 1], second.reshape(-1), atol=1e-6)


def test_only_a_random_projection_removes_the_mean_colour_of_a_patch():
    x = pictures() / 255.0
    kinds = ('random_projection', 'random_patches')
    centred, plain = (np.asarray(words_lib.patches(Tokenizer(k, **SMALL), x)) for k in kinds)
    mean = plain.reshape(8, 16, 16, 3).mean(axis=2)
    assert np.abs(mean).max() > 0.1
    np.testing.assert_allclose(centred, plain - np.tile(mean, 16), atol=1e-5)


def test_random_patches_are_unit_patches_of_as_many_images_as_there_are():
    tok = Tokenizer('random_patches', **SMALL)
    taken = []
    stream = (taken.append(x) or x for x in batches())
    book = words_lib.fit(tok, {}, stream, seed=3)['vectors']
    assert book.shape == (48, 48) and len(taken) == 6  # 48 images for 48 words
    found = [blocks.l2_normalize(words_lib.patches(tok, x / 255.0)) for x in taken]
    found = np.concatenate(found)  # (48 images, 16, 48)
    owner = [np.abs(found - e).max(axis=-1).min(axis=1).argmin() for e in np.asarray(book)]
    assert sorted(owner) == list(range(48))
    again = words_lib.fit(tok, {}, batches(), seed=3)['vectors']
    np.testing.assert_array_equal(book, again)


def test_few_images_give_several_patches_each():
    tok = Tokenizer('random_patches', vocab=40, image_patch=4, patch=4)
    book = words_lib.fit(tok, {}, batches(n=1), seed=0)['vectors']
    assert book.shape == (40, 48) and len(np.unique(np.round(book, 5), axis=0)) == 40


def test_more_words_than_patches_are_refused():
    tok = Tokenizer('random_patches', vocab=10_000, image_patch=4, patch=4)
    with pytest.raises(ValueError, match='vocab=10000 is more than the 512 patches of 32 batches'):
        words_lib.fit(tok, {}, batches(n=1), seed=0)


def test_kmeans_finds_the_directions_of_separate_clusters():
    rng = np.random.default_rng(0)
    centres = blocks.l2_normalize(rng.normal(size=(6, 20)))
    near = np.repeat(centres, 50, axis=0) + 0.02 * rng.normal(size=(300, 20))
    x = blocks.l2_normalize(jnp.asarray(rng.permutation(near)))
    means, counts = jnp.asarray(near[::50]), jnp.zeros(6)
    for part in np.split(np.asarray(x), 6):
        means, counts = words_lib.kmeans_step(means, counts, part)
    np.testing.assert_array_equal(counts, 50)
    words = np.asarray(words_lib.nearest(centres, x))
    of_all = np.stack([np.asarray(x)[words == i].mean(axis=0) for i in range(6)])
    np.testing.assert_allclose(means, of_all, atol=1e-6)
    assert float((blocks.l2_normalize(means) * centres).sum(axis=1).min()) > 0.999


def test_a_mean_that_wins_nothing_stays_where_it_is():
    means = jnp.asarray([[1.0, 0.0], [-1.0, 0.0]])
    moved, counts = words_lib.kmeans_step(means, jnp.zeros(2), jnp.asarray([[0.6, 0.8]]))
    np.testing.assert_allclose(moved, [[0.6, 0.8], [-1.0, 0.0]], atol=1e-7)
    np.testing.assert_array_equal(counts, [1, 0])


def test_kmeans_sees_as_many_patches_as_asked_and_fits_better_than_its_start(monkeypatch):
    monkeypatch.setattr(words_lib, 'FIT_PATCHES', 1500)
    tok = Tokenizer('kmeans', **SMALL)
    taken = []
    stream = (taken.append(x) or x for x in batches())
    book = words_lib.fit(tok, {}, stream, seed=0)
    assert len(taken) == 12  # of 128 patches each
    start = words_lib.fit(Tokenizer('random_patches', **SMALL), {}, batches(), seed=0)
    x = blocks.l2_normalize(words_lib.patches(tok, pictures(64, seed=99) / 255.0))

    def score(book):
        return float(jnp.einsum('bnd,vd->bnv', x, book['vectors']).max(axis=-1).mean())

    assert score(book) > score(start)


def test_statistics_of_known_counts():
    even = words_lib.statistics(jnp.full(16, 5.0))
    assert float(even['token_perplexity']) == pytest.approx(16, rel=1e-5)
    assert float(even['token_unigram']) == pytest.approx(np.log(16), rel=1e-5)
    one = words_lib.statistics(jnp.asarray([7.0, 0, 0]))
    assert float(one['token_perplexity']) == pytest.approx(1) and float(one['token_top']) == 1
    words = jnp.asarray([[0, 2], [2, 2]])
    np.testing.assert_array_equal(words_lib.count(words, 4), [1, 0, 3, 0])


@pytest.mark.parametrize(
    ('kind', 'instead'), [('random_projection', 'random_patches'), ('random_patches', 'kmeans')]
)
def test_a_poor_codebook_is_refused_with_its_number_unless_told_otherwise(kind, instead):
    tok = Tokenizer(kind, vocab=100)
    stats = words_lib.statistics(jnp.asarray([97.0, 1, 1, 1]))
    with pytest.raises(ValueError) as error:
        words_lib.check(tok, stats, 50.0)
    for part in ('1.2', '97%', 'min_perplexity=50', f'method.tokenizer={instead}'):
        assert part in str(error.value)
    words_lib.check(tok, stats, 0.0)


@pytest.mark.parametrize(
    ('kind', 'patch', 'sentence'),
    [
        ('kmeans', 5, 'token_patch_size=5 does not divide method.patch_size=16: use 4'),
        ('dvae', 4, 'set method.token_patch_size=8, not 4'),
    ],
)
def test_patches_that_do_not_fit_are_one_sentence(kind, patch, sentence):
    with pytest.raises(ValueError, match=sentence):
        Tokenizer(kind, patch=patch)


# The dVAE's encoder

DVAE = Tokenizer('dvae', vocab=11, image_patch=8)


@pytest.fixture
def narrow(monkeypatch):
    """A dVAE of 8 channels in place of 256."""
    monkeypatch.setattr(words_lib, 'DVAE_WIDTH', 8)


def dvae_weights(seed=0):
    rng = np.random.default_rng(seed)
    shapes = words_lib.dvae_shapes(DVAE.vocab)
    return {k: (rng.normal(size=s) / 3).astype(np.float32) for k, s in shapes.items()}


def official(name):
    """A name of ours as in the state dict of DALL-E's encoder."""
    parts = r'(group_\d|block_\d|res_path|id_path|conv_\d|conv|input|output)_'
    return 'blocks.' + re.sub(parts, r'\1.', name)


@pytest.mark.usefixtures('narrow')
def test_the_dvae_equals_a_torch_network_of_the_published_shape():
    torch = pytest.importorskip('torch')
    weights = dvae_weights()
    x = np.random.default_rng(1).random((2, 16, 24, 3)).astype(np.float32)

    def conv(name, y):
        w, b = (torch.from_numpy(weights[f'{name}_{leaf}']) for leaf in 'wb')
        return torch.nn.functional.conv2d(y, w, b, padding=(w.shape[-1] - 1) // 2)

    y = conv('input', 0.8 * torch.from_numpy(x).permute(0, 3, 1, 2) + 0.1)
    for g in range(1, 5):
        for n in (1, 2):
            name, z = f'group_{g}_block_{n}', y
            for i in range(1, 5):
                z = conv(f'{name}_res_path_conv_{i}', torch.relu(z))
            y = (conv(f'{name}_id_path', y) if f'{name}_id_path_w' in weights else y) + z / 64
        if g < 4:
            y = torch.nn.functional.max_pool2d(y, 2)
    want = conv('output_conv', torch.relu(y)).permute(0, 2, 3, 1).numpy()
    found = words_lib.dvae_logits(weights, jnp.asarray(x))
    assert found.shape == (2, 2, 3, 11)
    np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())
    words = words_lib.tokens(DVAE, weights, x)
    np.testing.assert_array_equal(words, want.reshape(2, 6, 11).argmax(axis=-1))


@pytest.mark.usefixtures('narrow')
def test_dvae_weights_are_taken_by_their_official_names():
    weights = dvae_weights()
    named = {official(k): v for k, v in weights.items()}
    assert 'blocks.group_2.block_1.id_path.w' in named
    assert 'blocks.group_1.block_2.res_path.conv_4.b' in named
    assert {'blocks.input.w', 'blocks.output.conv.w'} <= set(named)
    book = words_lib.dvae_codebook(DVAE, named)
    assert all(np.array_equal(book[k], weights[k]) for k in weights)


@pytest.mark.usefixtures('narrow')
def test_dvae_weights_that_do_not_fit_name_the_first_of_them():
    weights = dvae_weights()
    with pytest.raises(ValueError, match='output_conv_w is missing, expected'):
        words_lib.dvae_codebook(DVAE, {k: v for k, v in weights.items() if k != 'output_conv_w'})
    other = Tokenizer('dvae', vocab=12, image_patch=8)
    with pytest.raises(ValueError, match=r'output_conv_w has shape \(11, 64, 1, 1\), expected'):
        words_lib.dvae_codebook(other, weights)


def test_the_dvae_of_the_published_size_costs_what_its_convolutions_do():
    """A convolution of o x i x k x k weights costs twice their number at each of its positions."""
    tok = Tokenizer('dvae')
    assert sum(np.prod(s) for s in words_lib.dvae_shapes(8192).values()) == 53_786_240
    first = 2 * 64 * 256 * 3 * 49  # 64 pixels make a word
    assert words_lib.flops_per_patch(tok) > first + 2 * 8192 * 2048


# How real images use the codebooks: the order of the table in SplitMask's specification


def real_images(folder, size, count):
    source = sources.open_source(str(folder))
    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        image = host.decode(source[i % len(source)]['image'])
        found.append(host.random_resized_crop(image, rng, size, scale=(0.3, 1.0)))
    return np.stack(found)


def perplexity(images, patch, vocab, kind):
    tok = Tokenizer(kind, vocab=vocab, image_patch=patch, patch=patch)
    half = np.array_split(images[: len(images) // 2], 2)
    book = words_lib.init(tok, jax.random.key(0))
    book = words_lib.fit(tok, book, iter(half), seed=0)
    counts = words_lib.survey(tok, book, iter(np.array_split(images[len(images) // 2 :], 2)))
    return float(words_lib.statistics(counts)['token_perplexity'])


@pytest.mark.parametrize(
    ('name', 'size', 'patch', 'count'),
    [
        ('cifar10/train.parquet', 32, 4, 600),
        pytest.param('camvid/images/train', 112, 8, 200, marks=pytest.mark.slow),
    ],
)
def test_real_patches_use_the_codebooks_in_the_order_of_the_table(
    data_dir, name, size, patch, count, monkeypatch
):
    monkeypatch.setattr(words_lib, 'FIT_PATCHES', 20_000)
    images = real_images(data_dir / name, size, count)
    kinds = ('random_projection', 'random_patches', 'kmeans')
    found = {kind: perplexity(images, patch, 2048, kind) for kind in kinds}
    assert 100 < found['random_projection'] < found['random_patches'], found
    assert found['random_patches'] > 500 and found['kmeans'] > found['random_projection'], found


def test_an_image_made_of_its_own_words_is_drawn_as_itself():
    tok = Tokenizer('random_patches', 16, 8, 4)
    x = np.random.default_rng(0).random((1, 16, 16, 3)).astype(np.float32)
    x = x.repeat(2, axis=1).repeat(2, axis=2)  # the tokenizer sees means over squares of two
    vectors = blocks.l2_normalize(words_lib.patches(tok, x)[0])
    drawn = words_lib.draw(tok, {'vectors': vectors}, jnp.arange(16)[None], x)
    np.testing.assert_allclose(drawn, x, atol=2e-6)
