# SPDX-License-Identifier: Apache-2.0
"""TIFF of any layout comes out right, by a reference from the source pixels, or with a reason."""

import io
import itertools
import struct
import zlib

import cv2
import numpy as np
import PIL.Image
import pytest

from ssl_jax.data import host

NONE, FAX, LZW, JPEG, DEFLATE, PACKBITS = 1, 4, 5, 7, 8, 32773
INVERTED, GREY, RGB, PALETTE, CMYK, YCBCR, LAB = 0, 1, 2, 3, 5, 6, 8
IGNORED, PREMULTIPLIED, ALPHA = 0, 1, 2  # meanings of an extra band
H, W = 13, 18
V, U = np.mgrid[0 : 1 : H * 1j, 0 : 1 : W * 1j]
# Five bands in [0, 1], all different; the fourth is the alpha of a layout that has one.
BANDS = np.stack([U, V, (1 - U) * (1 - V), 0.4 + 0.6 * U * V, 1 - U], -1)


def packed(row, bits):
    ones = row[:, None] >> np.arange(bits)[::-1] & 1
    return np.packbits(ones.astype(np.uint8).ravel()).tobytes()


def packbits(data):
    cuts = range(0, len(data), 128)
    return b''.join(bytes([len(data[i : i + 128]) - 1]) + data[i : i + 128] for i in cuts)


def lzw(data):
    """A clear code before every 200 bytes: all codes stay 9 bits wide."""
    codes = []
    for i in range(0, len(data), 200):
        codes += [256, *data[i : i + 200]]
    return packed(np.array([*codes, 257]), 9)


COMPRESS = {NONE: bytes, DEFLATE: zlib.compress, PACKBITS: packbits, LZW: lzw}


def predicted(block):
    """Differences to the left neighbour."""
    return np.concatenate([block[:, :1], block[:, 1:] - block[:, :-1]], 1)


def tiff(
    samples,
    bits,
    photometric,
    extra=None,
    compression=NONE,
    planar=1,
    format=1,
    order='<',
    rows=5,
    tile=None,
    predictor=1,
    big=False,
    tags=(),
):
    """A file of samples (H, W, bands); a small writer in terms of the format's tables."""
    height, width, bands = samples.shape

    def body(block):
        block = predicted(block) if predictor == 2 else block
        if bits in (8, 16, 32, 64):
            return block.astype(block.dtype.newbyteorder(order)).tobytes()
        return b''.join(packed(row.ravel(), bits) for row in block)

    blocks = []
    for plane in [samples] if planar == 1 else np.split(samples, bands, 2):
        if tile:
            plane = np.pad(plane, ((0, -height % tile), (0, -width % tile), (0, 0)))
            for y, x in itertools.product(range(0, height, tile), range(0, width, tile)):
                blocks.append(body(plane[y : y + tile, x : x + tile]))
        else:
            blocks += [body(plane[y : y + rows]) for y in range(0, height, rows)]
    blocks = [COMPRESS[compression](b) for b in blocks]
    head = 16 if big else 8
    starts = np.cumsum([head, *map(len, blocks)]).tolist()
    entries = {
        **{
            256: (4, [width]),
            257: (4, [height]),
            258: (3, [bits] * bands),
            259: (3, [compression]),
        },
        **{262: (3, [photometric]), 277: (3, [bands]), 284: (3, [planar]), 317: (3, [predictor])},
        **{339: (3, [format] * bands), 324 if tile else 273: (4, starts[:-1])},
        325 if tile else 279: (4, list(map(len, blocks))),
        **({322: (4, [tile]), 323: (4, [tile])} if tile else {278: (4, [rows])}),
        **({} if extra is None else {338: (3, [extra])}),
        **{tag: (3, values) for tag, values in dict(tags).items()},
    }
    entries = {tag: entries[tag] for tag in sorted(entries) if entries[tag] is not None}
    word, size = ('Q', 8) if big else ('I', 4)
    at = starts[-1]
    there = at + (8 if big else 2) + len(entries) * (20 if big else 12) + size
    table, lists = struct.pack(order + ('Q' if big else 'H'), len(entries)), b''
    for tag, (type_, values) in entries.items():
        value = struct.pack(f'{order}{len(values)}{"HI"[type_ - 3]}', *values)
        if len(value) > size:
            value, lists = struct.pack(order + word, there + len(lists)), lists + value
        table += struct.pack(order + 'HH' + word, tag, type_, len(values)) + value.ljust(
            size, b'\0'
        )
    magic = b'II' if order == '<' else b'MM'
    first = (43, 8, 0, at) if big else (42, at)
    head = magic + struct.pack(order + ('HHHQ' if big else 'HI'), *first)
    return head + b''.join(blocks) + table + bytes(size) + lists


def stored(values, bits, format):
    if format == 3:
        return values.astype(f'f{bits // 8}')
    kind, top = ('u', 2**bits - 1) if format == 1 else ('i', 2 ** (bits - 1) - 1)
    size = next(n for n in (8, 16, 32) if n >= bits)
    return np.round(values * top).astype(f'{kind}{size // 8}')


def shown(values, photometric, extra):
    """What the eye sees of `values` in [0, 1]: uint8 (H, W, 3), by the words of the TIFF format."""
    n = {INVERTED: 1, GREY: 1, RGB: 3, CMYK: 4}[photometric]
    colours, alpha = values[:, :, :n], values[:, :, n:]
    if not alpha.size or extra == IGNORED:
        alpha = np.ones((H, W, 1))
    elif extra == PREMULTIPLIED:
        colours = np.divide(colours, alpha, where=alpha > 0, out=np.zeros_like(colours))
    if photometric == INVERTED:
        colours = 1 - colours
    elif photometric == CMYK:
        colours = (1 - colours[:, :, :3]) * (1 - colours[:, :, 3:])
    return np.broadcast_to((colours * alpha + 1 - alpha) * 255, (H, W, 3))


def reason(data):
    with pytest.raises(host.DecodeError) as e:
        host.decode(data)
    return str(e.value)


def check(data, expected, tolerance=1.01):
    out = host.decode(data)
    assert out.dtype == np.uint8 and out.shape == expected.shape
    assert np.abs(out - expected.astype(float)).max() <= tolerance


LAYOUTS = [
    *(
        (bands, photometric, extra)
        for photometric, n in ((INVERTED, 1), (GREY, 1), (RGB, 3), (CMYK, 4))
        for bands in (n, n + 1)
        for extra in ((IGNORED, PREMULTIPLIED, ALPHA) if bands > n else (None,))
    ),
    *((bands, GREY, IGNORED) for bands in (3, 4)),
    *((3, LAB, None), (5, RGB, IGNORED)),
]
DEPTHS = [
    *((b, 1) for b in (1, 2, 4, 6, 8, 10, 12, 14, 16, 32)),
    (16, 2),
    (16, 3),
    (32, 3),
    (64, 3),
]


@pytest.mark.parametrize('bits, format', DEPTHS)
def test_each_layout_is_right_or_refused_with_its_reason(bits, format):
    for (bands, photometric, extra), planar, compression in itertools.product(
        LAYOUTS, (1, 2), COMPRESS
    ):
        values = BANDS[:, :, :bands]
        if extra is not None and bands < 5:
            values = np.concatenate([values[:, :, :-1], BANDS[:, :, 3:4]], 2)
        if extra == PREMULTIPLIED:
            values = np.concatenate([values[:, :, :-1] * values[:, :, -1:], values[:, :, -1:]], 2)
        samples = stored(values, bits, format)
        data = tiff(samples, bits, photometric, extra, compression, planar, format)
        if photometric == LAB:
            assert 'colours of kind 8' in reason(data)
        elif bands > 4 or (bands >= 3 and photometric == GREY):
            assert f'{bands} bands (multispectral)' in reason(data)
        elif format == 2:
            assert 'signed 16-bit' in reason(data)
        elif (bits, format) == (32, 1):
            assert '32-bit pixels have no agreed white' in reason(data)
        else:
            top = 1 if format == 3 else 2**bits - 1
            # Colours and alpha are rounded before they meet.
            check(data, shown(samples / top, photometric, extra), 1.51)


@pytest.mark.parametrize('order', '<>')
@pytest.mark.parametrize('big', [False, True])
@pytest.mark.parametrize('bits', [4, 8, 12, 16])
def test_byte_order_tiles_predictors_and_bigtiff_change_nothing(order, big, bits):
    samples = stored(BANDS[:, :, :3], bits, 1)
    expected = shown(samples / (2**bits - 1), RGB, None)
    for planar, tile, compression in itertools.product((1, 2), (None, 16), (NONE, DEFLATE, LZW)):
        for predictor in (1, 2) if bits in (8, 16) else (1,):
            more = dict(tile=tile, predictor=predictor, big=big, order=order, planar=planar)
            check(tiff(samples, bits, RGB, compression=compression, **more), expected)
    for values, name in ((np.float32, 32), (np.float16, 16), (np.float64, 64)):
        data = tiff(BANDS[:, :, :3].astype(values), name, RGB, format=3, order=order, big=big)
        check(data, BANDS[:, :, :3] * 255)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_the_orientation_is_undone_as_by_pillow(orientation):
    data = tiff(stored(BANDS[:, :, :3], 8, 1), 8, RGB, tags={274: [orientation]})
    expected = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(host.decode(data), np.asarray(expected))


def test_bits_in_reversed_order_are_turned():
    for bits in (1, 8):
        samples = stored(BANDS[:, :, :1], bits, 1)
        data = tiff(samples, bits, GREY, rows=H, tags={266: [2]})
        end = 8 + H * -(-W * bits // 8)
        turned = bytes(int(f'{b:08b}'[::-1], 2) for b in data[8:end])
        check(data[:8] + turned + data[end:], shown(samples / (2**bits - 1), GREY, None))


@pytest.mark.parametrize('bits', [1, 2, 4, 8])
@pytest.mark.parametrize('top', [255, 65535])
def test_palettes_of_8_and_16_bits_a_colour(bits, top):
    table = np.linspace(0, top, 3 << bits).round().astype(int)
    index = (np.arange(H * W).reshape(H, W, 1) % 2**bits).astype(np.uint8)
    data = tiff(index, bits, PALETTE, compression=DEFLATE, tags={320: table.tolist()})
    check(data, table.reshape(3, -1).T[index[:, :, 0]] * 255 / top)


def test_a_palette_that_is_short_is_named():
    index = np.zeros((H, W, 1), np.uint8)
    assert 'a palette of 3 numbers' in reason(tiff(index, 8, PALETTE, tags={320: [1, 2, 3]}))


@pytest.mark.parametrize('depth', [10, 12, 14, 16])
def test_a_range_that_the_file_does_not_state_is_the_smallest_that_holds_its_pixels(depth):
    for bands, photometric in ((3, RGB), (1, GREY), (1, INVERTED)):
        samples = np.round(BANDS[:, :, :bands] * (2**depth - 1)).astype(np.uint16)
        for compression, planar in ((NONE, 1), (DEFLATE, 2)):
            data = tiff(samples, 16, photometric, compression=compression, planar=planar)
            check(data, shown(BANDS[:, :, :bands], photometric, None))
    grey = cv2.imencode('.png', samples[:, :, 0])[1].tobytes()
    check(grey, shown(BANDS[:, :, :1], GREY, None))


def test_alpha_of_16_bits_beside_colours_of_12_has_its_own_range():
    for alpha_top in (4095, 65535):
        tops = np.array([4095, 4095, 4095, alpha_top])
        samples = np.round(BANDS[:, :, :4] * tops).astype(np.uint16)
        check(tiff(samples, 16, RGB, ALPHA), shown(samples / tops, RGB, ALPHA), 1.51)
        data = cv2.imencode('.png', samples[:, :, [2, 1, 0, 3]])[1].tobytes()
        check(data, shown(samples / tops, RGB, ALPHA), 1.51)


def test_a_stated_range_wins_unless_a_pixel_is_brighter():
    samples = np.round(BANDS[:, :, :1] * 3000).astype(np.uint16)
    for stated, white in ((3000, 3000), (65535, 65535), (5000, 5000), (200, 4095)):
        data = tiff(samples, 16, GREY, tags={281: [stated]})
        check(data, shown(samples / white, GREY, None))
    wide = tiff(samples.astype(np.uint32), 32, GREY, tags={281: [3000]})
    check(wide, shown(samples / 3000, GREY, None))


def test_a_fourth_band_without_a_word_is_alpha_as_its_writers_mean():
    samples = stored(BANDS[:, :, :4], 16, 1)
    check(tiff(samples, 16, RGB), shown(samples / 65535, RGB, ALPHA))
    bgra = np.round(BANDS[:, :, [2, 1, 0, 3]] * 255).astype(np.uint8)
    data = cv2.imencode('.tif', bgra)[1].tobytes()
    check(data, shown(BANDS[:, :, :4], RGB, ALPHA), 2)


def test_floats_outside_of_0_to_1_are_refused_with_their_range():
    for bad, words in ((255.0, 'reach from 0 to 255'), (-0.5, 'from -0.5'), (np.nan, 'NaN')):
        samples = BANDS[:, :, :1].astype(np.float32)
        samples[3, 4] = bad
        assert words in reason(tiff(samples, 32, GREY, format=3))


@pytest.mark.parametrize('mode', ['L', 'RGB', 'RGBA', 'CMYK', 'YCbCr', '1'])
def test_what_pillow_writes_with_its_codecs_is_what_opencv_and_pillow_read(mode):
    picture = np.asarray(
        PIL.Image.fromarray(np.round(BANDS[:, :, :3] * 255).astype(np.uint8)).resize((90, 70))
    )
    image = PIL.Image.fromarray(picture).convert(mode)
    for codec in (
        None,
        'tiff_lzw',
        'tiff_adobe_deflate',
        'packbits',
        'jpeg',
        'group4',
        'zstd',
        'lzma',
    ):
        if (codec == 'group4') != (mode == '1') and codec in ('jpeg', 'group4'):
            continue
        out = io.BytesIO()
        image.save(out, 'TIFF', compression=codec)
        if mode == 'YCbCr' and codec is None:
            assert 'in YCbCr of a rare layout' in reason(out.getvalue())
            continue
        got = host.decode(out.getvalue())
        expected = image.convert('RGB') if codec != 'jpeg' else PIL.Image.open(out).convert('RGB')
        assert np.abs(got - np.asarray(expected).astype(int)).max() <= (4 if mode == 'YCbCr' else 1)
        other = cv2.imdecode(np.frombuffer(out.getvalue(), np.uint8), cv2.IMREAD_COLOR)
        if other is not None:  # it has no zstd and no LZMA
            limit = 12 if mode == 'CMYK' else 4  # its black of CMYK differs a little
            assert np.abs(got - other[:, :, ::-1].astype(int)).mean() <= limit


@pytest.mark.parametrize('compression', COMPRESS)
@pytest.mark.parametrize('planar', [1, 2])
def test_a_file_that_lacks_pixels_is_refused_wherever_it_is_cut(compression, planar):
    samples = np.random.default_rng(0).integers(0, 2**16, (H, W, 3)).astype(np.uint16)
    data = tiff(samples, 16, RGB, compression=compression, planar=planar)
    for share in (0.01, 0.1, 0.5, 0.9, 0.97, 0.995):
        assert 'truncated or corrupt' in reason(data[: int(len(data) * share)])
    # The tags are whole, and the data of the last strip are not.
    missing = tiff(samples, 16, RGB, compression=compression, planar=planar, tags={257: [H + 5]})
    assert 'truncated or corrupt' in reason(missing)


def test_what_the_tags_declare_is_checked_before_anything_is_allocated():
    one = np.zeros((1, 1, 1), np.uint8)

    def declared(**tags):
        names = dict(width=256, height=257, bits=258, bands=277, rows=278)
        names |= dict(tile_width=322, tile_height=323)
        return tiff(
            one, 8, GREY, compression=DEFLATE, tags={names[k]: [v] for k, v in tags.items()}
        )

    assert 'million pixels' in reason(declared(width=60000, height=60000))
    assert 'truncated or corrupt' in reason(declared(width=0))
    assert 'truncated or corrupt' in reason(declared(width=9000, height=9000, rows=9000))
    assert 'million pixels' in reason(declared(tile_width=60000, tile_height=60000))
    assert 'bands' in reason(declared(bands=60000))


def test_other_layouts_are_refused_by_name():
    grey, rgb = (np.zeros((H, W, n), np.uint8) for n in (1, 3))
    assert 'compression 34887' in reason(tiff(grey, 8, GREY, tags={259: [34887]}))
    assert 'bands of 5, 6, 5 bits' in reason(tiff(rgb, 8, RGB, tags={258: [5, 6, 5]}))
    assert 'colours of kind 32803' in reason(tiff(grey, 8, 32803))
    assert 'predictor 3' in reason(tiff(rgb, 8, RGB, tags={317: [3]}))
    assert 'samples of format [5]' in reason(tiff(rgb, 8, RGB, format=5))
    assert 'a raw file of a camera' in reason(tiff(rgb, 8, RGB, tags={50706: [1]}))
    assert 'colours are RGB' in reason(tiff(grey, 8, RGB))
