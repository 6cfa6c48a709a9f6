# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys

import numpy as np
import PIL.Image

from ssl_jax.data import scenes
from ssl_jax.viz import draw


def images(n=3, size=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def read(path):
    return np.asarray(PIL.Image.open(path).convert('RGB'))


def tile(sheet, row, column, size, header=True):
    y = draw.MARGIN + header * draw.HEADER + row * (size + draw.GAP)
    x = draw.MARGIN + column * (size + draw.GAP)
    return sheet[y : y + size, x : x + size]


def sheet_size(rows, columns, size, header=True):
    width = 2 * draw.MARGIN + columns * size + (columns - 1) * draw.GAP
    return 2 * draw.MARGIN + header * draw.HEADER + rows * size + (rows - 1) * draw.GAP, width, 3


def write_rows(path, rows, tail=''):
    path.write_text(''.join(json.dumps(r) + '\n' for r in rows) + tail)


def test_reconstruction_has_the_columns_in_order_and_pixels_are_repeated_exactly(tmp_path):
    keys = ('image', 'masked', 'means', 'prediction', 'stitched')
    made = {k: images(seed=i) for i, k in enumerate(keys)}
    draw.reconstruction_grid(made, tmp_path / 'new' / 'r.png')
    sheet = read(tmp_path / 'new' / 'r.png')
    assert sheet.shape == sheet_size(3, 6, 128)
    for j, key in enumerate((*keys, 'image')):
        want = made[key][2].repeat(16, axis=0).repeat(16, axis=1)
        np.testing.assert_array_equal(tile(sheet, 2, j, 128), want)


def test_reconstruction_has_a_header_over_every_column(tmp_path):
    made = {k: images() for k in ('image', 'masked', 'stitched')}
    draw.reconstruction_grid(made, tmp_path / 'r.png')
    sheet = read(tmp_path / 'r.png')
    assert sheet.shape == sheet_size(3, 4, 128)
    for j in range(4):
        x = draw.MARGIN + j * (128 + draw.GAP)
        above = sheet[4 : draw.MARGIN + draw.HEADER - 2, x : x + 128]
        assert (above < 100).sum() > 50  # ink


def test_floats_in_0_1_and_uint8_give_the_same_picture(tmp_path):
    made = {k: images() for k in ('image', 'masked', 'stitched')}
    draw.reconstruction_grid(made, tmp_path / 'a.png')
    draw.reconstruction_grid({k: v / 255.0 for k, v in made.items()}, tmp_path / 'b.png')
    np.testing.assert_array_equal(read(tmp_path / 'a.png'), read(tmp_path / 'b.png'))


def test_values_outside_0_1_and_nan_are_drawn_not_wrapped(tmp_path):
    x = np.zeros((1, 8, 8, 3))
    x[0, 0, 0], x[0, 1, 1], x[0, 2, 2] = 1.7, -0.3, np.nan
    draw.contact_sheet(x, tmp_path / 'c.png')
    got = tile(read(tmp_path / 'c.png'), 0, 0, 128, header=False)[::16, ::16, 0]
    assert (got[0, 0], got[1, 1], got[2, 2]) == (255, 0, 0)


def test_contact_sheet_is_about_square_and_large_images_keep_their_size(tmp_path):
    pictures = images(7, 150)
    draw.contact_sheet(pictures, tmp_path / 'c.png')
    sheet = read(tmp_path / 'c.png')
    assert sheet.shape == sheet_size(3, 3, 150, header=False)
    np.testing.assert_array_equal(tile(sheet, 2, 0, 150, header=False), pictures[6])
    assert (tile(sheet, 2, 1, 150, header=False) == 255).all()


def test_pca_is_drawn_beside_its_image(tmp_path):
    tokens = np.random.default_rng(0).normal(size=(3, 4, 8))
    pictures = images(3, 128)
    whole, front = draw.pca_patches(tokens, (2, 2), pictures, tmp_path / 'p.png')
    sheet = read(tmp_path / 'p.png')
    assert sheet.shape[1] == sheet_size(2, 6, 128)[1]
    np.testing.assert_array_equal(tile(sheet, 1, 0, 128), pictures[2])
    np.testing.assert_array_equal(tile(sheet, 1, 1, 128)[::64, ::64], whole[2])
    np.testing.assert_array_equal(tile(sheet, 1, 2, 128)[::64, ::64], front[2])
    note = sheet[draw.MARGIN + draw.HEADER + 2 * 128 + draw.GAP :]
    assert (note < 100).sum() > 500  # ink


def test_what_is_subtracted_from_tokens_is_not_drawn(tmp_path):
    rng = np.random.default_rng(0)
    tokens, place = rng.normal(size=(3, 16, 8)), 9 * rng.normal(size=(16, 8))
    shown = [
        draw.pca_patches(x, (4, 4), images(3, 16), tmp_path / 'p.png', mean, 64)
        for x, mean in ((tokens, None), (tokens + place, place), (tokens + place, None))
    ]
    np.testing.assert_allclose(shown[1][0], shown[0][0].astype(int), atol=1)
    assert np.abs(shown[2][0] - shown[0][0].astype(int)).mean() > 20


def test_classes_are_drawn_in_their_colours_and_named_where_they_occur(tmp_path):
    source = scenes.Scenes(3, 64)
    items = [source[i] for i in range(3)]
    pictures, truth = (np.stack([x[k] for x in items]) for k in ('image', 'segmentation'))
    truth[0, :16] = 255
    wrong = np.where(truth == 0, 3, truth)
    names = ('background', *scenes.CLASSES)
    maps = {'truth': truth, 'prediction': wrong}
    draw.segmentation_rows(pictures, maps, names, tmp_path / 's.png', 'A note.')
    sheet, colours = read(tmp_path / 's.png'), draw.class_colours(11)
    for row in range(3):
        for column, want in ((1, truth), (2, wrong)):
            np.testing.assert_array_equal(
                tile(sheet, row, column, 128)[::2, ::2], colours[want[row]]
            )
    assert (tile(sheet, 0, 1, 128)[:32] == 255).all()
    below = sheet[draw.MARGIN + draw.HEADER + 3 * 128 + 2 * draw.GAP :].reshape(-1, 3)
    occur = set(np.unique(truth[truth < 255])) | set(np.unique(wrong[wrong < 255]))
    in_legend = {i for i in range(11) if (below == colours[i]).all(axis=1).sum() > 50}
    assert in_legend == occur and len(occur) < 11


def test_true_and_predicted_depth_have_one_scale_and_what_was_not_measured_is_white(tmp_path):
    source = scenes.Scenes(2, 64)
    pictures, truth = (np.stack([source[i][k] for i in range(2)]) for k in ('image', 'depth'))
    truth[1, :8] = 0
    draw.depth_rows(pictures, {'truth': truth, 'prediction': truth}, tmp_path / 'd.png')
    sheet = read(tmp_path / 'd.png')
    for row in range(2):
        np.testing.assert_array_equal(tile(sheet, row, 1, 128), tile(sheet, row, 2, 128))
    assert (tile(sheet, 1, 1, 128)[:16] == 255).all()
    brightness = tile(sheet, 1, 1, 128)[16::2, ::2].astype(int).sum(axis=2).ravel()
    order = truth[1, 8:].ravel().argsort()
    assert brightness[order[-200:]].min() > brightness[order[:200]].max()  # far is bright
    bottom = sheet[draw.MARGIN + draw.HEADER + 2 * 128 + draw.GAP :]
    bar = draw.heat(np.arange(100), 0, 100)
    assert all((bottom == colour).all(axis=2).any() for colour in bar[10::20])


def test_colours_of_twenty_classes_are_told_apart_by_the_colour_blind():
    """Under simulated loss of each cone, at the least distance of Okabe and Ito's eight colours."""
    c = draw.class_colours(20)[:20] / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    linear = np.concatenate([linear, np.ones((1, 3))])  # and white, of ignored pixels
    losses = (  # Machado et al. 2009, severity 1
        np.eye(3),
        [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
        [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
        [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
    )
    cones = [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]
    to_lab = [[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]
    for loss in losses:
        seen = np.clip(linear @ np.transpose(loss), 0, 1)
        lab = np.cbrt(seen @ np.transpose(cones)) @ np.transpose(to_lab)  # OKLab
        distance = np.linalg.norm(lab[:, None] - lab[None], axis=2) + np.eye(21)
        assert distance.min() > 0.07


def test_each_of_many_classes_has_a_colour_and_the_ignored_index_is_white():
    for count in (2, 60, 150, 254):
        colours = draw.class_colours(count)
        assert (colours[:count] != 255).any(axis=1).all() and (colours[255] == 255).all()
    assert len(np.unique(draw.class_colours(60)[:60], axis=0)) == 60


def test_attention_is_drawn_beside_its_image_with_its_largest_value_white(tmp_path):
    weights = np.zeros((2, 3, 2, 2))
    weights[1, 2] = [[0, 0.1], [0.2, 0.05]]
    pictures = images(2, 128)
    draw.attention_maps(weights, pictures, tmp_path / 'a.png')
    sheet = read(tmp_path / 'a.png')
    assert sheet.shape == sheet_size(2, 4, 128)
    np.testing.assert_array_equal(tile(sheet, 1, 0, 128), pictures[1])
    np.testing.assert_array_equal(tile(sheet, 1, 3, 128)[::64, ::64, 0], [[0, 128], [255, 64]])


def test_maps_span_the_colours_and_what_is_not_known_is_white(tmp_path):
    values = np.arange(16.0).reshape(1, 4, 4)
    values[0, 3, 3] = np.nan
    draw.importance_rows(images(1), {'a': values, 'b': -values}, tmp_path / 'a.png', 'a note')
    sheet = read(tmp_path / 'a.png')
    a, b = (tile(sheet, 0, column, 128) for column in (1, 2))
    np.testing.assert_array_equal(a[-1, -1], 255)
    np.testing.assert_array_equal(a[0, 0], draw.heat([0], 0, 1)[0])
    np.testing.assert_array_equal(b[0, 0], draw.heat([1], 0, 1)[0])


def test_curves_draw_the_panels_that_have_data(tmp_path):
    rows = [{'step': s, 'loss': 1 / s} for s in range(1, 9)]
    write_rows(tmp_path / 'm.jsonl', rows)
    draw.curves(tmp_path / 'm.jsonl', tmp_path / 'one.png')
    for row in rows:
        row.update({'lr': 0.1, 'knn/cls/20': 50.0, 'time': {'images_per_second': 9.0}})
    write_rows(tmp_path / 'm.jsonl', rows)
    draw.curves(tmp_path / 'm.jsonl', tmp_path / 'four.png')
    assert read(tmp_path / 'one.png').shape == (330, 520, 3)
    assert read(tmp_path / 'four.png').shape == (660, 1040, 3)
    for row in rows:
        row['seg/miou'] = 30.0
    write_rows(tmp_path / 'm.jsonl', rows)
    draw.curves(tmp_path / 'm.jsonl', tmp_path / 'five.png')
    assert read(tmp_path / 'five.png').shape == (990, 1040, 3)
    assert (read(tmp_path / 'four.png') != 255).any()


def test_torn_last_line_and_rows_without_a_step_change_nothing(tmp_path):
    rows = [{'step': s, 'loss': 1 / s} for s in range(1, 9)]
    write_rows(tmp_path / 'whole.jsonl', rows)
    write_rows(tmp_path / 'torn.jsonl', [*rows, {'loss': 7}, 3], tail='{"step": 9, "lo')
    for name in ('whole', 'torn'):
        draw.curves(tmp_path / f'{name}.jsonl', tmp_path / f'{name}.png')
    np.testing.assert_array_equal(read(tmp_path / 'whole.png'), read(tmp_path / 'torn.png'))


def test_values_that_are_not_finite_are_passed_over(tmp_path):
    rows = [{'step': 1, 'loss': 0.5}, {'step': 2, 'loss': 'nan'}, {'step': 3, 'loss': float('inf')}]
    write_rows(tmp_path / 'm.jsonl', rows)
    steps, values = draw.series(tmp_path / 'm.jsonl')['loss']
    assert (steps.tolist(), values.tolist()) == ([1], [0.5])


def test_the_last_row_of_a_step_counts(tmp_path):
    write_rows(tmp_path / 'm.jsonl', [{'step': s, 'loss': x} for s, x in ((2, 5), (1, 7), (2, 6))])
    steps, values = draw.series(tmp_path / 'm.jsonl')['loss']
    assert (steps.tolist(), values.tolist()) == ([1, 2], [7, 6])


def test_curves_before_the_first_row_are_a_picture_too(tmp_path):
    draw.curves(tmp_path / 'absent.jsonl', tmp_path / 'c.png')
    assert read(tmp_path / 'c.png').shape == (330, 520, 3)


def test_importing_viz_does_not_import_matplotlib():
    code = 'import sys; from ssl_jax.viz import draw; sys.exit("matplotlib" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_captions_stand_below_their_images_and_short_rows_are_filled_up(tmp_path):
    x = images(3, 128)
    draw.captioned_sheet([[x[0], x[1]], [x[2]]], [['first', ''], ['third']], tmp_path / 'c.png')
    sheet, pitch = read(tmp_path / 'c.png'), 128 + draw.LINE + draw.GAP
    at = draw.MARGIN, draw.MARGIN + 128 + draw.GAP
    for k, (row, column) in enumerate(((0, 0), (0, 1), (1, 0))):
        y, left = draw.MARGIN + row * pitch, at[column]
        np.testing.assert_array_equal(sheet[y : y + 128, left : left + 128], x[k])
        below = sheet[y + 128 : y + 128 + draw.LINE, left : left + 128]
        assert ((below < 100).sum() > 20) == (k != 1)  # ink
    assert (
        sheet[draw.MARGIN + pitch : draw.MARGIN + pitch + 128, at[1] : at[1] + 128] == 255
    ).all()


def test_a_histogram_has_its_bars_and_a_line_at_each_mark(tmp_path):
    values = {'near': np.full(50, 0.5), 'far': np.linspace(0, 1, 200)}
    for marks in ({}, {'threshold': 0.8}):
        draw.histogram(values, marks, 'cosine', tmp_path / f'{len(marks)}.png')
    plain, marked = read(tmp_path / '0.png'), read(tmp_path / '1.png')
    changed = (plain != marked).any(axis=2)
    column = changed.sum(axis=0).argmax()  # the dashed line
    assert changed[:, column].sum() > 0.4 * len(plain)
    assert 0.7 * plain.shape[1] < column < 0.9 * plain.shape[1]
