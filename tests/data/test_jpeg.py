# SPDX-License-Identifier: Apache-2.0
"""JPEGs that only look odd give the pixels of the intact file; damaged ones give a reason."""

import io
import itertools
import re
import struct

import cv2
import numpy as np
import PIL.Image
import pytest

from ssl_jax.data import host, jpeg

EOI = b'\xff\xd9'


def photo(height=96, width=128):
    """Smooth colours with noise: every block has data, none of it alike."""
    v, u = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    noise = np.random.default_rng(0).normal(0, 0.05, (height, width, 3))
    return ((np.stack([u, v, (1 - u) * (1 - v)], -1) + noise).clip(0, 1) * 255).astype(np.uint8)


def encode(mode='RGB', **options):
    out = io.BytesIO()
    PIL.Image.fromarray(photo()).convert(mode).save(out, 'JPEG', quality=90, **options)
    return out.getvalue()


KINDS = {
    'baseline': encode(),
    'progressive': encode(progressive=True),
    'optimized': encode(optimize=True),
    'restarts': encode(restart_marker_rows=1),
    '444': encode(subsampling=0),
    'grey': encode('L'),
    'CMYK': encode('CMYK'),
}


@pytest.fixture(params=KINDS)
def intact(request):
    return KINDS[request.param]


def segment(marker, content):
    return b'\xff' + bytes([marker]) + struct.pack('>H', len(content) + 2) + content


def after_start(data, what):
    return data[:2] + what + data[2:]


def before(data, marker, what):
    at = data.index(b'\xff' + bytes([marker]))
    return data[:at] + what + data[at:]


def without_jfif(data):
    return data.replace(data[2:20], b'', 1) if data[2:4] == b'\xff\xe0' else data


def refused(data):
    with pytest.raises(host.DecodeError, match='truncated or corrupt JPEG') as e:
        host.decode(data)
    return str(e.value)


ODD = {
    'bytes behind the end': lambda x: x + bytes(range(256)),
    'zeros behind the end': lambda x: x + bytes(4000),
    'a second picture behind the end': lambda x: x + KINDS['444'],
    'no end marker': lambda x: x[:-2],
    'half of an end marker': lambda x: x[:-1],
    'no end marker, zeros instead': lambda x: x[:-2] + bytes(300),
    'no end marker, spaces instead': lambda x: x[:-2] + b' ' * 300,
    'few zeros before the end': lambda x: x[:-2] + bytes(2) + EOI,
    'some zeros before the end': lambda x: x[:-2] + bytes(9) + EOI,
    'many zeros before the end': lambda x: x[:-2] + bytes(999) + EOI,
    'ones before the end': lambda x: x[:-2] + b'\xff' * 20 + EOI,
    'a pattern before the end': lambda x: x[:-2] + b'\x55' * 64 + EOI,
    'junk before the first segment': lambda x: after_start(x, b'abc'),
    'zeros before a table': lambda x: before(x, 0xDB, bytes(5)),
    'junk before the frame': lambda x: before(x, 0xC4, b'\0\1\2\xff\0\3'),
    'junk before the scan': lambda x: before(x, 0xDA, b'xy\xff\xff'),
    'JFIF 0.00': lambda x: x.replace(b'JFIF\0\1\1', b'JFIF\0\0\0'),
    'JFIF 2.17': lambda x: x.replace(b'JFIF\0\1\1', b'JFIF\0\2\x11'),
    'JFIF cut to 7 bytes': lambda x: after_start(without_jfif(x), segment(0xE0, b'JFIF\0\1\1')),
    'a bad ICC profile': lambda x: after_start(x, segment(0xE2, b'ICC_PROFILE\0\5\2abc')),
    'a short Adobe segment': lambda x: after_start(x, segment(0xEE, b'Ado')),
    'comments': lambda x: after_start(x, segment(0xFE, b'\xff\xd8\xff\xda') * 3),
    'fill bytes before each segment': lambda x: x[:2] + b'\xff' * 9 + x[2:],
    'junk and no end marker': lambda x: before(x, 0xDA, b'xyz')[:-2],
}


@pytest.mark.parametrize('odd', ODD)
def test_what_costs_no_pixel_is_read_and_gives_the_pixels_of_the_intact_file(intact, odd):
    np.testing.assert_array_equal(host.decode(ODD[odd](intact)), host.decode(intact))


def test_an_unknown_adobe_transform_is_ycbcr_and_a_known_one_is_obeyed():
    for transform in (1, 3, 7, 255):
        adobe = segment(0xEE, b'Adobe\0\x64\0\0\0\0' + bytes([transform]))
        data = after_start(without_jfif(KINDS['baseline']), adobe)
        np.testing.assert_array_equal(host.decode(data), host.decode(KINDS['baseline']))
    rgb = after_start(without_jfif(KINDS['444']), segment(0xEE, b'Adobe\0\x64\0\0\0\0\0'))
    odd = host.decode(before(rgb, 0xDA, b'junk'))
    np.testing.assert_array_equal(odd, host.decode(rgb))
    assert np.abs(odd - host.decode(KINDS['444']).astype(int)).mean() > 20


def test_limits_of_a_scan_that_mean_nothing_in_sequential_files_are_mended():
    data = KINDS['baseline']
    at = data.index(b'\xff\xda') + 11
    assert data[at : at + 3] == b'\0\x3f\0'
    for limits in (b'\0\0\0', b'\1\x3f\0', b'\0\x3f\1'):
        odd = data[:at] + limits + data[at + 3 :]
        np.testing.assert_array_equal(host.decode(odd), host.decode(data))


def renumbered(data, number):
    n = itertools.count()
    scan = data.index(b'\xff\xda')
    marked = re.sub(
        rb'\xff[\xd0-\xd7]', lambda m: bytes([0xFF, 0xD0 + number(next(n)) % 8]), data[scan:]
    )
    return data[:scan] + marked


def intervals(data):
    scan = data.index(b'\xff\xda') + 14
    return data[:scan], re.split(rb'\xff[\xd0-\xd7]', data[scan:-2])


def joined(head, parts):
    marked = [p + bytes([0xFF, 0xD0 + i % 8]) for i, p in enumerate(parts[:-1])]
    return head + b''.join([*marked, parts[-1]]) + EOI


def test_restart_markers_that_count_otherwise_are_read():
    data = KINDS['restarts']
    assert joined(*intervals(data)) == data
    for number in (lambda i: 0, lambda i: i + 1, lambda i: i + 5):
        odd = renumbered(data, number)
        with pytest.raises(ValueError):
            jpeg.simplejpeg.decode_jpeg(odd)  # libjpeg alone resynchronizes, and shifts blocks
        np.testing.assert_array_equal(host.decode(odd), host.decode(data))


def test_padding_of_restart_intervals_is_removed():
    head, parts = intervals(KINDS['restarts'])
    for pad in (bytes(2), bytes(7), bytes(64), b'\xff' * 3):
        odd = joined(head, [p + pad for p in parts])
        np.testing.assert_array_equal(host.decode(odd), host.decode(KINDS['restarts']))


def test_intervals_that_are_missing_doubled_or_exchanged_are_refused():
    data = KINDS['restarts']
    head, parts = intervals(data)
    refused(joined(head, parts[:2] + parts[3:]))
    refused(joined(head, parts[:2] + parts[1:]))
    at = [m.start() for m in re.finditer(rb'\xff[\xd0-\xd7]', data)]
    refused(data[: at[1]] + data[at[2] :])  # lost, and the numbers tell
    numbers = [0, 1, 3, 2, 4]
    refused(renumbered(data, lambda i: numbers[i]))


@pytest.mark.parametrize('share', [0.2, 0.5, 0.8, 0.95, 0.995])
def test_a_truncated_file_is_refused_whatever_stands_in_for_the_rest(intact, share):
    start = intact.index(b'\xff\xda') + 14
    data = intact[: start + int((len(intact) - start - 3) * share)]
    for rest in (b'', EOI, bytes(2000), bytes(2000) + EOI, b' ' * 2000 + EOI, b'\xff' * 50 + EOI):
        refused(data + rest)


def test_data_that_end_before_their_last_byte_are_refused(intact):
    for lost in (2, 3, 5, 8):
        refused(intact[: -2 - lost])
        refused(intact[: -2 - lost] + EOI)


def test_a_progressive_file_that_lacks_scans_is_refused_though_each_scan_is_whole():
    data = KINDS['progressive']
    scans = [m.start() for m in re.finditer(rb'\xff\xda', data)]
    tables = [data.rindex(b'\xff\xc4', 0, at) for at in scans[1:]]
    for at in tables:
        refused(data[:at])


def test_a_scan_or_table_whose_marker_is_damaged_is_noticed():
    for options in (dict(), dict(subsampling=0), dict(restart_marker_rows=1)):
        data = encode(progressive=True, **options)
        first = data.index(b'\xff\xda')
        markers = [m.start() for m in re.finditer(rb'\xff[\xc4\xda]', data) if m.start() >= first]
        assert len(markers) > 15
        for at in markers:
            for damaged in (b'\0' + data[at + 1 : at + 2], b'\xff\0', b'\xff\xec'):
                refused(data[:at] + damaged + data[at + 2 :])


def test_a_file_without_chroma_scans_is_refused():
    head = KINDS['444'][: KINDS['444'].index(b'\xff\xda')]
    grey = encode('L')
    data = grey[grey.index(b'\xff\xda') + 10 : -2]
    refused(head + b'\xff\xda\0\x08\1\1\0\0\x3f\0' + data)


def test_bytes_that_may_be_shifted_image_data_are_refused():
    """Damage ends in left-over image data; random bytes before the end are the same to libjpeg."""
    junk = np.random.default_rng(0).integers(0, 255, 40, dtype=np.uint8).tobytes()
    assert 'extraneous bytes' in refused(KINDS['baseline'][:-2] + junk + EOI)


def test_damage_is_read_no_more_often_than_libjpeg_lets_pass():
    """What strict libjpeg refuses after real damage, the removal of odd bytes must not let in."""
    rng = np.random.default_rng(0)
    noticed = 0
    for data in (KINDS['baseline'], KINDS['restarts'], KINDS['progressive']):
        start = data.index(b'\xff\xda') + 14
        for _ in range(150):
            at, size = int(rng.integers(start, len(data) - 300)), int(rng.integers(1, 200))
            new = [bytes(size), rng.bytes(size), b'', b'\xff' * size][rng.integers(4)]
            bad = data[:at] + new + data[at + size :]
            try:
                jpeg.simplejpeg.decode_jpeg(bad)
            except ValueError:
                noticed += 1
                refused(bad)
    assert noticed > 300


def test_cmyk_is_what_pillow_and_opencv_show_and_its_damage_is_noticed():
    data = KINDS['CMYK']
    out = host.decode(data)
    pillow = np.asarray(PIL.Image.open(io.BytesIO(data)).convert('RGB')).astype(int)
    opencv = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]
    assert np.abs(out - pillow).max() <= 1 and np.abs(out - opencv.astype(int)).max() <= 3
    assert host.decode(data, 40).shape == (48, 64, 3)
    ycck = data.replace(b'Adobe\0\x64\0\0\0\0\0', b'Adobe\0\x64\0\0\0\0\2')
    assert ycck != data
    pillow = np.asarray(PIL.Image.open(io.BytesIO(ycck)).convert('RGB')).astype(int)
    assert np.abs(host.decode(ycck) - pillow).max() <= 1
    middle = len(data) // 2
    refused(data[:middle] + data[middle + 500 :])


def test_orientation_and_scaled_decoding_work_on_a_mended_file():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    data = encode(exif=exif)
    odd = before(data, 0xDA, b'junk')[:-2]
    assert host.decode(odd).shape == (128, 96, 3)
    for least in (None, 48, 70):
        np.testing.assert_array_equal(host.decode(odd, least), host.decode(data, least))


def test_mpo_gives_its_first_picture():
    out = io.BytesIO()
    first, second = PIL.Image.fromarray(photo()), PIL.Image.fromarray(photo()[::-1])
    first.save(out, 'MPO', save_all=True, append_images=[second], quality=90)
    pillow = PIL.Image.open(out)
    assert pillow.format == 'MPO' and pillow.n_frames == 2
    np.testing.assert_array_equal(host.decode(out.getvalue()), np.asarray(pillow))


def test_a_file_of_many_scans_is_refused_at_once():
    data = KINDS['progressive']
    last = data.rindex(b'\xff\xda')
    with pytest.raises(host.DecodeError, match='more than 100 scans'):
        host.decode(data[:last] + data[last:-2] * 100 + EOI)
    assert host.decode(data + data * 20).shape == (96, 128, 3)  # behind the end


def test_a_size_beyond_the_limit_is_refused_in_the_header():
    data = KINDS['baseline']
    at = data.index(b'\xff\xc0') + 5
    for size in ((65000, 65000), (65000, 2754)):
        with pytest.raises(host.DecodeError, match='million pixels'):
            host.decode(data[:at] + struct.pack('>HH', *size) + data[at + 4 :])
