# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import encoder, sharding
from ssl_jax.augment import photometry
from ssl_jax.data import sources
from ssl_jax.evals import features
from ssl_jax.models import vit as vit_lib


def arrays(n=21, size=8, labels=True):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    return sources.Arrays(images, np.arange(n) % 5 if labels else None), images


def mean_colour(images):
    return {'mean': images.astype(jnp.float32).mean(axis=(1, 2))}


def make_vit(num_cls_tokens=2):
    vit = vit_lib.ViT(
        embed_dim=16, depth=2, num_heads=2, patch_size=4, img_size=8, num_cls_tokens=num_cls_tokens
    )
    return vit, vit_lib.init_params(vit, jax.random.key(0))


def test_features_come_in_order_without_padding():
    source, images = arrays()
    got, labels = features.extract(mean_colour, source, transform=8, batch_size=8)
    np.testing.assert_allclose(got['mean'], images.mean(axis=(1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(labels, np.arange(21) % 5)


def test_every_batch_has_one_shape():
    shapes = set()

    def forward(images):
        shapes.add(images.shape)
        return {'x': np.zeros((len(images), 1), np.float32)}

    features.extract(forward, arrays()[0], transform=8, batch_size=8)
    assert shapes == {(8, 8, 8, 3)}


def test_a_mesh_gives_the_features_of_one_device():
    if len(jax.devices()) < 8:
        pytest.skip(f'needs 8 devices, this process sees {len(jax.devices())}')
    source, _ = arrays()
    forward = encoder.make_forward(*make_vit())
    one, _ = features.extract(forward, source, transform=8, batch_size=10)
    mesh = sharding.make_mesh(data=4, fsdp=2)
    many, labels = features.extract(forward, source, transform=8, batch_size=10, mesh=mesh)
    for name in one:
        np.testing.assert_allclose(many[name], one[name], atol=2e-5, rtol=1e-4)
    assert len(labels) == 21


def test_images_that_do_not_decode_are_left_out_with_their_labels():
    good = arrays(1)[1][0]
    source = sources.Arrays([good, b'broken', good], [0, 1, 2])
    got, labels = features.extract(mean_colour, source, transform=8, batch_size=2)
    assert len(got['mean']) == 2
    np.testing.assert_array_equal(labels, [0, 2])


def test_a_source_without_labels_has_none():
    assert features.extract(mean_colour, arrays(labels=False)[0], transform=8)[1] is None


def test_stop_request_raises():
    with pytest.raises(features.Stopped):
        features.extract(mean_colour, arrays()[0], transform=8, should_stop=lambda: True)


def test_limit_takes_images_of_all_classes_from_a_sorted_source():
    images = np.zeros((100, 8, 8, 3), np.uint8)
    source = sources.Arrays(images, np.repeat(np.arange(4), 25))
    _, labels = features.extract(mean_colour, source, transform=8, limit=30)
    assert len(labels) == 30 and set(labels) == {0, 1, 2, 3}


def test_encoder_features_are_the_stated_means():
    vit, params = make_vit()
    images = arrays(3)[1]
    got = encoder.make_forward(vit, params)(images)
    tokens = vit.apply({'params': params}, photometry.normalize(images))
    close = dict(atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(got['cls'], tokens['cls_tokens'].mean(1), **close)
    np.testing.assert_allclose(got['cls_pre'], tokens['pre_norm'][:, :2].mean(1), **close)
    np.testing.assert_allclose(got['patch'], tokens['patch_tokens'].mean(1), **close)
    np.testing.assert_array_equal(got['cls_patch'], np.hstack([got['cls'], got['patch']]))


def test_encoder_without_class_tokens_has_only_patch_features():
    got = encoder.make_forward(*make_vit(num_cls_tokens=0))(arrays(3)[1])
    assert set(got) == {'patch', 'grid2'}


@pytest.mark.parametrize('grid, cells', [((2, 2), 2), ((4, 6), 2), ((3, 5), 2), ((7, 9), 4)])
def test_means_over_cells_are_torchs_adaptive_average_pooling(grid, cells):
    torch = pytest.importorskip('torch')
    x = np.random.default_rng(0).normal(size=(2, grid[0] * grid[1], 3)).astype(np.float32)
    square = torch.tensor(x.reshape(2, *grid, 3)).permute(0, 3, 1, 2)
    want = torch.nn.functional.adaptive_avg_pool2d(square, cells).permute(0, 2, 3, 1)
    got = encoder.cell_means(x, grid, cells)
    np.testing.assert_allclose(got, want.reshape(2, -1), atol=1e-6)


@pytest.mark.parametrize(
    'grid, embed_dim, want',
    [((8, 8), 128, 4), ((2, 3), 128, 2), ((1, 9), 128, 1), ((14, 14), 768, 3), ((14, 14), 3200, 1)],
)
def test_the_grid_has_at_most_4_cells_a_side_and_8192_numbers(grid, embed_dim, want):
    assert encoder.grid_cells(grid, embed_dim) == want


def test_half_precision_forward_returns_float32():
    vit, params = make_vit()
    full = encoder.make_forward(vit, params)(arrays(3)[1])
    half = encoder.make_forward(vit.clone(dtype=jnp.bfloat16), params)(arrays(3)[1])
    for name in full:
        assert half[name].dtype == jnp.float32
        assert 0 < np.abs(half[name] - full[name]).max() < 0.2


def test_raw_pixels_are_area_means_of_the_image():
    image = np.zeros((1, 8, 8, 3), np.uint8)
    image[:, :, 4:] = 255
    got = features.raw_pixels(2)(image)['pixels'].reshape(2, 2, 3)
    low, high = photometry.normalize(np.array([[0] * 3, [255] * 3], np.uint8))
    assert (got[:, 0] < got[:, 1]).all()
    np.testing.assert_allclose(got.mean((0, 1)), (low + high) / 2, atol=1e-5)
    same = features.raw_pixels(32)(image)['pixels']
    np.testing.assert_allclose(same, photometry.normalize(image).reshape(1, -1), atol=1e-5)


def test_split_is_disjoint_complete_and_stable():
    source, _ = arrays(50)
    train, test = features.split(source)
    assert (len(train), len(test)) == (40, 10)
    picked = features.pick(50, 10)
    # Written down once: another machine or version must give the same.
    np.testing.assert_array_equal(picked, [3, 10, 18, 20, 21, 33, 40, 41, 48, 49])
    assert [test[i]['label'] for i in range(10)] == [int(i) % 5 for i in picked]
    rest = [i for i in range(50) if i not in set(picked.tolist())]
    assert [train[i]['label'] for i in range(40)] == [i % 5 for i in rest]


def test_golden_dinov2_eval_depth_knn_linear_inputs_of_the_linear_classifier(golden):
    f = golden('dinov2_eval_depth_knn_linear')
    cls, patches = jnp.asarray(f['in/lin_cls']), jnp.asarray(f['in/lin_patch'])
    names = f.under('out')
    found = [k for k in names if k.startswith('linear_input')]
    assert found
    for name in found:
        n, avgpool = (int(part.strip('navg')) for part in name.split('_')[2:])
        patch = patches[-1].mean(axis=1) if avgpool else None
        f.check(f'out/{name}', encoder.linear_input(cls[-n:], patch))


def test_class_tokens_of_the_last_blocks_end_with_the_usual_one():
    vit = vit_lib.ViT(embed_dim=16, depth=3, num_heads=2, patch_size=4, img_size=8)
    params = vit_lib.init_params(vit, jax.random.key(0))
    images = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
    out = encoder.make_forward(vit, params, last_blocks=2)(images)
    assert out['cls2'].shape == (2, 32) and out['cls2_patch'].shape == (2, 48)
    np.testing.assert_allclose(out['cls2'][:, 16:], out['cls'], atol=1e-6)
    np.testing.assert_array_equal(out['cls2_patch'][:, 32:], out['patch'])
    assert np.abs(out['cls2'][:, :16] - out['cls']).max() > 1e-3
