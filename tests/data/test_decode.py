# SPDX-License-Identifier: Apache-2.0
"""Formats other than JPEG and TIFF: the pixels of a second decoder, or a reason."""

import concurrent.futures
import io
import pickle
import struct
import subprocess
import sys
import zlib

import numpy as np
import PIL.Image
import pytest

from ssl_jax.data import host

H, W = 13, 18
V, U = np.mgrid[0 : 1 : H * 1j, 0 : 1 : W * 1j]
BANDS = np.stack([U, V, (1 - U) * (1 - V), 0.4 + 0.6 * U * V], -1)  # in [0, 1]


def noise(height=64, width=80):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


def encode(image, format, **options):
    out = io.BytesIO()
    image = image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(image)
    image.save(out, format, **options)
    return out.getvalue()


def over_white(values):
    """Grey or RGB, with or without alpha, in [0, 1] -> what is seen, in 0 ... 255."""
    n = 3 if values.shape[2] > 2 else 1
    alpha = values[:, :, n:] if values.shape[2] > n else 1
    seen = (values[:, :, :n] * alpha + 1 - alpha) * 255
    return np.broadcast_to(seen, (*values.shape[:2], 3))


def check(data, expected, tolerance=1.01):
    out = host.decode(data)
    assert out.dtype == np.uint8 and out.shape == expected.shape
    assert np.abs(out - expected.astype(float)).max() <= tolerance


def reason(data):
    with pytest.raises(host.DecodeError) as e:
        host.decode(data)
    return str(e.value)


def chunk(name, content):
    crc = zlib.crc32(name + content)
    return struct.pack('>I', len(content)) + name + content + struct.pack('>I', crc)


def packed(row, bits):
    return np.packbits((row[:, None] >> np.arange(bits)[::-1] & 1).astype(np.uint8)).tobytes()


PASSES = (
    (0, 8, 0, 8),
    (4, 8, 0, 8),
    (0, 4, 4, 8),
    (2, 4, 0, 4),
    (0, 2, 2, 4),
    (1, 2, 0, 2),
    (0, 1, 1, 2),
)
ADAM7 = [(slice(y, None, dy), slice(x, None, dx)) for x, dx, y, dy in PASSES]


PNGS = (0, 1), (4, 2), (2, 3), (6, 4)  # kind of colour, bands


def png(samples, bits, colour, interlaced=False, size=None, **chunks):
    rows = b''
    for part in ADAM7 if interlaced else [(slice(None),) * 2]:
        for row in samples[part] if samples[part].size else ():
            rows += b'\0' + (
                row.astype('>u2').tobytes() if bits == 16 else packed(row.ravel(), bits)
            )
    width, height = size or samples.shape[1::-1]
    head = struct.pack('>IIBBBBB', width, height, bits, colour, 0, 0, interlaced)
    data = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head)
    data += b''.join(chunk(name.encode(), content) for name, content in chunks.items())
    return data + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')


@pytest.mark.parametrize('interlaced', [False, True])
@pytest.mark.parametrize(
    'bits, colour, bands',
    [*((b, 0, 1) for b in (1, 2, 4)), *((b, *c) for b in (8, 16) for c in PNGS)],
)
def test_png_of_all_depths(bits, colour, bands, interlaced):
    values = BANDS[:, :, [0, 3] if bands == 2 else slice(bands)]
    samples = np.round(values * (2**bits - 1)).astype(int)
    check(png(samples, bits, colour, interlaced), over_white(samples / (2**bits - 1)), 1.51)


@pytest.mark.parametrize(
    'bits, colour, bands', [*((b, 0, 1) for b in (1, 2, 4, 8, 16)), (8, 2, 3), (16, 2, 3)]
)
def test_the_transparent_colour_of_a_png_becomes_white_at_all_depths(bits, colour, bands):
    samples = np.round(BANDS[:, :, :bands] * (2**bits - 1)).astype(int)
    hidden = samples[5, 7]
    expected = over_white(samples / (2**bits - 1)).copy()
    expected[(samples == hidden).all(2)] = 255
    check(png(samples, bits, colour, tRNS=hidden.astype('>u2').tobytes()), expected)


@pytest.mark.parametrize('bits', [1, 2, 4, 8])
def test_a_palette_with_transparency(bits):
    index = np.arange(H * W).reshape(H, W, 1) % 2**bits
    table = np.random.default_rng(0).integers(0, 256, (2**bits, 4))
    table[-1, 3] = 255  # the list of alphas may be shorter than the palette
    plain = table[:, :3].astype(np.uint8).tobytes()
    alpha = table[:-1, 3].astype(np.uint8).tobytes()
    data = png(index, bits, 3, PLTE=plain, tRNS=alpha)
    check(data, over_white(table[index[:, :, 0]] / 255), 1.51)


def test_the_orientation_of_a_deep_png_is_undone():
    for bands, colour in ((1, 0), (3, 2)):
        samples = np.round(BANDS[:, :, :bands] * 65535).astype(int)
        exif = PIL.Image.Exif()
        exif[0x0112] = 6
        data = png(samples, 16, colour, eXIf=exif.tobytes()[6:])
        check(data, np.rot90(over_white(samples / 65535), -1))


def test_a_deep_file_of_fewer_bits_is_not_black():
    for depth in (10, 12, 14):
        samples = np.round(BANDS[:, :, :3] * (2**depth - 1)).astype(np.uint16)
        check(png(samples, 16, 2), over_white(BANDS[:, :, :3]))
        check(png(samples[:, :, :1], 16, 0), over_white(BANDS[:, :, :1]))
        np.testing.assert_allclose(host.decode(samples), over_white(BANDS[:, :, :3]), atol=1)


def test_a_png_of_which_the_rest_was_never_written_is_refused():
    data = encode(noise(), 'PNG')
    for share in (0.3, 0.6, 0.9, 0.99):
        cut = int(len(data) * share)
        assert 'truncated or corrupt' in reason(data[:cut])
        assert 'truncated or corrupt' in reason(data[:cut] + bytes(len(data) - cut))
    deep = png(noise().astype(int) * 257, 16, 2)
    assert 'truncated or corrupt' in reason(deep[: len(deep) // 2])
    assert 'truncated or corrupt' in reason(deep[:-300] + bytes(300))


@pytest.mark.parametrize('white', [1, 15, 100, 255, 1023, 4095, 65535])
def test_netpbm_is_scaled_by_its_white(white):
    for bands, binary, plain in ((1, b'P5', b'P2'), (3, b'P6', b'P3')):
        samples = np.round(BANDS[:, :, :bands] * white).astype(int)
        expected = over_white(samples / white)
        head = f'\n# a comment\n{W} {H}\n{white}\n'.encode()
        body = samples.astype('>u2' if white > 255 else 'u1').tobytes()
        check(binary + head + body, expected)
        check(plain + head + ' '.join(map(str, samples.ravel())).encode(), expected)
        assert 'truncated or corrupt' in reason(binary + head + body[:-1])
    assert 'million pixels' in reason(b'P6\n60000 60000\n4095\n' + bytes(999))
    assert 'truncated or corrupt' in reason(b'P6\n10 0\n4095\n' + bytes(999))


def test_a_float_map_in_0_to_1_is_read():
    pfm = b'Pf\n18 13\n-1.0\n'
    check(pfm + BANDS[::-1, :, 0].astype('<f4').tobytes(), over_white(BANDS[:, :, :1]))
    assert 'reach from 0 to 20' in reason(pfm + (20 * BANDS[::-1, :, 0]).astype('<f4').tobytes())


def bmp(rgba, masks=None):
    """32 bits a pixel, bottom up; `masks`: of red, green, blue, alpha."""
    size = 40 if masks is None else 56
    body = np.ascontiguousarray(rgba[::-1, :, [2, 1, 0, 3]]).tobytes()
    head = struct.pack('<IiiHHIIiiII', size, W, H, 1, 32, 0 if masks is None else 3, 0, 0, 0, 0, 0)
    head += struct.pack('<4I', *masks) if masks else b''
    at = 14 + len(head)
    return b'BM' + struct.pack('<IHHI', at + len(body), 0, 0, at) + head + body


def test_the_fourth_byte_of_a_bmp_is_alpha_only_if_it_has_a_mask():
    rgba = np.round(BANDS * 255).astype(np.uint8)
    seen = rgba / 255
    masks = 0xFF0000, 0xFF00, 0xFF
    check(bmp(rgba), over_white(seen[:, :, :3]))
    check(bmp(rgba, (*masks, 0)), over_white(seen[:, :, :3]))
    check(bmp(rgba, (*masks, 0xFF000000)), over_white(seen), 1.51)


@pytest.mark.parametrize('format', ['WEBP', 'PNG', 'GIF', 'AVIF', 'JPEG2000', 'TGA'])
def test_transparency_becomes_white_in_each_format(format):
    rgba = np.zeros((H, W, 4), np.uint8)
    rgba[:, : W // 2] = 200, 30, 90, 255
    options = {'WEBP': dict(lossless=True), 'AVIF': dict(quality=100)}.get(format, {})
    out = host.decode(encode(rgba, format, **options))
    assert np.abs(out[:, W // 2 + 2 :] - 255.0).max() <= 3
    assert np.abs(out[:, : W // 2 - 2] - [200.0, 30, 90]).max() <= 6


@pytest.mark.parametrize('format', ['GIF', 'PNG', 'WEBP', 'AVIF'])
def test_of_an_animation_with_transparency_the_first_frame_is_read(format):
    first, second = (PIL.Image.new('RGBA', (W, H), c) for c in ((0, 0, 0, 0), (0, 0, 255, 255)))
    first.paste((200, 30, 90, 255), (0, 0, W // 2, H))
    data = encode(first, format, save_all=True, append_images=[second], duration=100)
    assert PIL.Image.open(io.BytesIO(data)).n_frames == 2
    out = host.decode(data).astype(int)
    assert (out[:, W // 2 + 2 :] >= 252).all()
    assert np.abs(out[:, : W // 2 - 2] - [200, 30, 90]).max() <= 8


def test_deep_jpeg_2000_is_scaled():
    grey = np.round(BANDS[:, :, 0] * 65535).astype(np.uint16)
    check(encode(grey, 'JPEG2000'), over_white(BANDS[:, :, :1]))
    dark = encode((grey // 64).astype(np.uint16), 'JPEG2000')  # it states 16 bits
    check(dark, over_white(BANDS[:, :, :1] / 64))


@pytest.mark.parametrize('format', ['WEBP', 'AVIF', 'JPEG2000', 'GIF', 'PNG', 'HEIF'])
def test_cut_or_half_written_files_are_refused(format):
    if format == 'HEIF':
        pytest.importorskip('pillow_heif')
    data = heic() if format == 'HEIF' else encode(noise(), format)
    for share in (0.05, 0.3, 0.6, 0.9):
        cut = int(len(data) * share)
        assert 'truncated or corrupt' in reason(data[:cut])
        assert 'truncated or corrupt' in reason(data[:cut] + bytes(len(data) - cut))


def test_a_blank_image_is_not_taken_for_one_that_was_never_written():
    for colour in ('black', 'white', (37, 99, 201)):
        for format, options in (
            ('WEBP', {}),
            ('WEBP', dict(lossless=True)),
            ('AVIF', dict(speed=10)),
        ):
            out = host.decode(encode(PIL.Image.new('RGB', (600, 400), colour), format, **options))
            assert (
                np.abs(out - np.asarray(PIL.Image.new('RGB', (600, 400), colour)).astype(int)).max()
                < 6
            )
    padded = encode(noise(), 'WEBP') + bytes(500)  # behind the end that the file states
    assert host.decode(padded).shape == (64, 80, 3)


def heic(image=None, **options):
    heif = pytest.importorskip('pillow_heif')
    out = io.BytesIO()
    image = PIL.Image.fromarray(noise() if image is None else image)
    heif.from_pillow(image).save(out, quality=90, **options)
    return out.getvalue()


def test_heic_is_read_and_nothing_is_registered_in_pillow():
    picture = np.kron(noise(8, 10), np.ones((16, 16, 1), np.uint8))
    data = heic(picture, chroma=444)
    assert np.abs(host.decode(data) - picture.astype(int)).mean() < 4
    assert 'HEIF' not in PIL.Image.OPEN
    rgba = np.dstack([picture, np.zeros(picture.shape[:2], np.uint8)])
    rgba[:, :80, 3] = 255
    out = host.decode(heic(rgba, chroma=444)).astype(int)
    assert np.abs(out[:, :80] - picture[:, :80]).mean() < 4 and (out[:, 90:] > 250).all()


def test_the_orientation_of_a_heic_is_undone_once():
    picture = np.kron(noise(8, 10), np.ones((16, 16, 1), np.uint8))
    for orientation, turns in ((3, 2), (6, -1), (8, 1)):
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        out = host.decode(heic(picture, chroma=444, exif=exif.tobytes()))
        expected = np.rot90(picture, turns)
        assert out.shape == expected.shape and np.abs(out - expected.astype(int)).mean() < 4


def test_heic_without_the_extra_says_how_to_install_it(monkeypatch):
    data = heic()
    monkeypatch.setitem(sys.modules, 'pillow_heif', None)
    assert "an HEIC photo, and pillow_heif is missing: pip install 'ssl_jax[heif]'" in reason(data)
    for brand in (b'heix', b'mif1'):
        assert 'ssl_jax[heif]' in reason(data[:8] + brand + data[12:])


def test_postscript_and_other_containers_are_named():
    eps = encode(PIL.Image.new('RGB', (4, 4)), 'EPS')
    assert 'PostScript' in reason(eps)
    assert 'a isom container' in reason(b'\0\0\0\x18ftypisom' + bytes(99))


HUGE = struct.pack('>II', 60000, 60000)


def declared():
    """{format: a small file that declares 60000 x 60000 pixels, or the most it can}."""
    image = PIL.Image.new('RGB', (64, 48), 'red')
    size = struct.pack('>II', 64, 48)
    webp = encode(PIL.Image.new('RGBA', (64, 48)), 'WEBP')
    at = webp.index(b'VP8X') + 12
    j2k, avif = encode(image, 'JPEG2000'), encode(image, 'AVIF')
    bmp, gif = bytearray(encode(image, 'BMP')), bytearray(encode(image, 'GIF'))
    bmp[18:26] = struct.pack('<ii', 60000, 60000)
    gif[6:10] = struct.pack('<HH', 60000, 60000)
    return {
        'WebP': webp[:at] + struct.pack('<I', 16382)[:3] * 2 + webp[at + 6 :],
        'JPEG 2000': j2k.replace(struct.pack('>II', 48, 64), HUGE).replace(size, HUGE),
        'AVIF': avif.replace(size, HUGE),
        'BMP': bytes(bmp),
        'GIF': bytes(gif),
        'PNG': png(np.zeros((1, 1, 1), int), 8, 0, size=(60000, 60000)),
        'PNG of 16 bits': png(np.zeros((1, 1, 3), int), 16, 2, size=(60000, 60000)),
        'PPM': b'P6\n60000 60000\n255\n' + bytes(99),
    }


PEAK = """
import pickle, resource, sys
from ssl_jax.data import host
files = pickle.load(sys.stdin.buffer)
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, data in files.items():
    try:
        host.decode(data)
        print(name, 'was read')
    except host.DecodeError as e:
        print(name, e)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) // 1024)
"""


def test_no_format_allocates_what_its_header_only_declares():
    files = declared() | {'HEIC': heic().replace(struct.pack('>II', 80, 64), HUGE)}
    done = subprocess.run(
        [sys.executable, '-c', PEAK], input=pickle.dumps(files), capture_output=True, timeout=100
    )
    *lines, peak = done.stdout.decode().splitlines()
    assert len(lines) == len(files), done.stderr.decode()
    for line in lines:
        assert 'million pixels' in line or 'truncated or corrupt' in line
    assert int(peak) < 150  # MiB


def test_threads_do_not_disturb_each_other():
    files = [encode(noise(), f) for f in ('PNG', 'WEBP', 'TIFF', 'JPEG', 'GIF', 'BMP', 'AVIF')]
    files += [png(noise().astype(int) * 257, 16, 2), files[3][:-2], files[0][:-99]]

    def read(data):
        try:
            return host.decode(data).tobytes()
        except host.DecodeError as e:
            return str(e)

    expected = [read(data) for data in files]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, files * 12)) == expected * 12
