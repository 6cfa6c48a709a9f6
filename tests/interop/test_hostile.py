# SPDX-License-Identifier: Apache-2.0
"""Files made to hang, to fill the memory or to reach other files: one sentence each, at once."""

import contextlib
import faulthandler
import io
import json
import os
import pickle
import resource
import signal
import socket
import struct
import zipfile

import numpy as np
import pytest

from ssl_jax.interop import files
from ssl_jax.run import errors

SECONDS = 5  # each takes less than one on an idle core
MEMORY = 1 << 30  # more than this may not be allocated


@contextlib.contextmanager
def at_once():
    """Fails what hangs, and what allocates much."""

    def stop(*_):
        raise TimeoutError(f'more than {SECONDS} s')

    old, limits = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    with open('/proc/self/statm') as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(4 * SECONDS, exit=True)  # no signal ends a hash
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, old)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def refused(path):
    """The one sentence with which `path` is refused."""
    with at_once(), pytest.raises(errors.UserError) as error:
        files.read(path)
    text = str(error.value)
    assert str(path) in text and text.isprintable() and len(text) < 1000
    return text


# Pickles


def archive(path, data, members=()):
    """A zip as torch.save writes it, around any pickle."""
    with zipfile.ZipFile(path, 'w') as file:
        file.writestr('a/data.pkl', data)
        file.writestr('a/byteorder', 'little')
        for name, value in members:
            file.writestr(f'a/data/{name}', value)


def text(s):
    return b'X' + struct.pack('<I', len(s)) + s.encode()


def tensor(shape=b'K\x01\x85', stride=b'K\x01\x85', offset=b'K\0', count=b'K\x01', key='0'):
    """Operations that make a tensor; one number unless told."""
    storage = b'(' + text('storage') + b'ctorch\nFloatStorage\n' + text(key) + text('cpu') + count
    call = b'ctorch._utils\n_rebuild_tensor_v2\n('
    return call + storage + b'tQ' + offset + shape + stride + b'\x89)tR'


def named(value, name=None):
    """A pickle of {'x': value}."""
    return b'\x80\x02}' + (name or text('x')) + value + b's.'


def big(n):
    return b'\x8a' + bytes([16]) + n.to_bytes(16, 'little', signed=True)


TWICE = b')' + b'2\x86' * 60  # ((((), ()), ...), ...): 2 ** 60 leaves
DEEP = b')' + b'\x85' * 300_000
PICKLES = {
    'a key whose hash takes for ever': named(b'N', TWICE),
    'a key whose hash overflows the stack': named(b'N', DEEP),
    'a key in DICT': b'\x80\x02(' + TWICE + b'Nd.',
    'a key in SETITEMS': b'\x80\x02}(' + TWICE + b'Nu.',
    'a set': b'\x80\x04\x8f(' + TWICE + b'\x90.',
    'a frozenset': b'\x80\x04(' + TWICE + b'\x91.',
    'a set of builtins': b'\x80\x02c__builtin__\nset\n]' + TWICE + b'a\x85R.',
    'pairs for OrderedDict': b'\x80\x02ccollections\nOrderedDict\n](' + TWICE + b'N\x86e\x85R.',
    'keys that are tuples of ints': b'\x80\x02}('
    + b''.join(b'K\1' + big(i << 61) + b'\x86N' for i in range(20_000))
    + b'u.',
    'keys of one hash': b'\x80\x02}('
    + b''.join(big(i * (2**61 - 1)) + b'N' for i in range(60_000))
    + b'u.',
    'a storage of a strange type': b'\x80\x02(' + text('storage') + TWICE + TWICE + b'NNtQ.',
    'a storage of a strange name': named(tensor().replace(text('0'), TWICE)),
    'a storage with a long name': named(tensor(key='0' * 10**6)),
    'a huge index of the memo': b'\x80\x02Nr\xff\xff\xff\x7f.',
    'a huge index in digits': b'\x80\x02Np99999999999999\n.',
    'no end': b'\x80\x02' + b'N0' * 1_000_000,
    'many marks': b'\x80\x02' + b'(' * 2_000_000 + b'.',
    'a long list again and again': b'\x80\x02](' + b'N' * 100_000 + b'eq\0'
    b'' + b'ccollections\nOrderedDict\nq\1' + b'h\1h\0\x85R0' * 50_000 + b'.',
    'many arguments again and again': b'\x80\x02(' + b'N' * 100_000 + b'tq\0'
    b'' + b'cpathlib\nPosixPath\nq\1' + b'h\1h\0R0' * 50_000 + b'.',
    'a list within itself': b'\x80\x02]q\0h\0a.',
    'a dict within itself': b'\x80\x02}q\0' + text('model') + b'h\0s.',
    'a deep list': b'\x80\x02' + b']' * 100_000 + b'a' * 99_999 + b'.',
    'a declared LONG4': b'\x80\x02\x8b\xff\xff\xff\x7f\1.',
    'a long LONG4': named(b'\x8b' + struct.pack('<i', 10**6) + b'\1' * 10**6),
    'a LONG4 as a key': named(b'N', b'\x8b' + struct.pack('<i', 9999) + b'\1' * 9999),
    'a long text of digits': named(b'L' + b'9' * 10**6 + b'L\n'),
    'a declared BINUNICODE8': b'\x80\x04\x8d' + struct.pack('<Q', 2**62) + b'x.',
    'a declared BINBYTES8': b'\x80\x04\x8e' + struct.pack('<Q', 2**40) + b'x.',
    'a declared BYTEARRAY8': b'\x80\x05\x96' + struct.pack('<Q', 2**40) + b'x.',
    'a declared FRAME': b'\x80\x04\x95' + struct.pack('<Q', 2**62) + b'N.',
    'a buffer of another process': b'\x80\x05\x97.',
    'an extension code': b'\x80\x02\x82\x01.',
    'a persistent name as text': b'\x80\x02Pstorage\n.',
    'a protocol to come': b'\x80\xff.',
    'an empty stack': b'\x80\x02.',
    'a mark too many': b'\x80\x02t.',
    'a state that sets attributes': b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}'
    + text('__code__')
    + b'NsbR.',
    'an instance by its class': b'\x80\x02(cos\nsystem\no.',
    'a call of text': b'\x80\x02' + text('x') + b')R.',
    'a tensor of too many numbers': named(tensor(b'K\x02\x85')),
    'a tensor that repeats one number': named(tensor(b'J\0\0\0\x40J\0\0\0\x40\x86', b'K\0K\0\x86')),
    'a tensor of an overflowing shape': named(tensor(big(2**63) * 2 + b'\x86', b'K\0K\0\x86')),
    'an empty tensor of an overflowing shape': named(
        tensor(big(2**61) + big(2**61) + b'K\0\x87', b'K\0K\0K\0\x87')
    ),
    'a tensor of a negative size': named(tensor(b'J\xff\xff\xff\xff\x85')),
    'a tensor before its storage': named(tensor(offset=b'J\xff\xff\xff\xff')),
    'a tensor of many dimensions': named(
        tensor(b'(' + b'K\1' * 10**5 + b't', b'(' + b'K\1' * 10**5 + b't')
    ),
    'a tensor whose shape is text': named(tensor(text('9' * 4000) + b'\x85')),
    'a storage of a huge count': named(tensor(count=big(2**62))),
    'a name of two lines': b'\x80\x02}' + text('a\n\x1b[2J' * 5000) + b'Ns.',
    'code with a long name': b'\x80\x04' + text('os\n') + text('x' * 10**6) + b'\x93.',
}


@pytest.mark.parametrize('data', PICKLES.values(), ids=PICKLES)
def test_a_hostile_pickle_is_refused_at_once(tmp_path, data):
    archive(tmp_path / 'a.pth', data, [('0', b'\0' * 4)])
    refused(tmp_path / 'a.pth')


def test_the_pickle_from_which_those_are_made_is_read(tmp_path):
    archive(tmp_path / 'a.pth', named(tensor()), [('0', np.float32(2.5).tobytes())])
    assert files.read(tmp_path / 'a.pth').tensors['x'] == 2.5


def test_odd_keys_and_states_beside_the_weights_do_no_harm(tmp_path):
    torch = pytest.importorskip('torch')
    options = {(1, 'a'): {4}, 5: 10**200, 'path': tmp_path, None: 1.5}
    torch.save({'model': {'x': torch.ones(2)}, 'options': options}, tmp_path / 'a.pth')
    np.testing.assert_array_equal(files.read(tmp_path / 'a.pth').tensors['x'], [1, 1])


def test_a_large_model_with_its_optimizer_is_within_the_limits(tmp_path):
    torch = pytest.importorskip('torch')
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(1500)]
    optimizer = torch.optim.AdamW(params)
    sum(p.sum() for p in params).backward()
    optimizer.step()
    weights = {f'backbone.blocks.{i}.attention.projection.weight': p for i, p in enumerate(params)}
    state = {'student': weights, 'teacher': weights, 'optimizer': optimizer.state_dict()}
    torch.save(state, tmp_path / 'a.pth')
    with at_once():
        assert len(files.read(tmp_path / 'a.pth').tensors) == 1500


# Zip archives


def lie(path, at, value):
    """Changes a number of the end record of a zip archive, at `at` from its start."""
    data = bytearray(path.read_bytes())
    start = data.rindex(b'PK\5\6') + at
    data[start : start + len(value)] = value
    path.write_bytes(data)


def array(shape, descr='<f4', data=b''):
    """A `.npy` with a header that says anything."""
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b'\x93NUMPY\1\0' + struct.pack('<H', len(header)) + header + data


def npz(*arrays, compression=zipfile.ZIP_STORED, count=1):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', compression) as file:
        for i, x in enumerate(arrays * count):
            file.writestr(f'{i}.npy', x)
    return out.getvalue()


def objects():
    out = io.BytesIO()
    np.savez(out, x=np.array([os.system], object))
    return out.getvalue()


NPZ = {
    'three GB of a few bytes': lambda: npz(array((805306368,))),
    'exabytes': lambda: npz(array((2**62, 4))),
    'a negative shape': lambda: npz(array((-1, 4), data=b'\0' * 64)),
    'an overflowing shape': lambda: npz(array((2**64, 0))),
    'a shape of text': lambda: npz(array("('a',)")),
    'a shape of many dimensions': lambda: npz(array((1,) * 2000, data=b'\0' * 4)),
    'a deep header': lambda: npz(array('(' * 5000)),
    'a declared header': lambda: npz(b'\x93NUMPY\2\0' + struct.pack('<I', 2**32 - 1)),
    'objects': objects,
    'objects by their header': lambda: npz(array((1,), '|O', pickle.dumps([1]))),
    'a record': lambda: npz(array((1,), [('a', '<f4')], b'\0' * 4)),
    'a bomb': lambda: npz(array((2**26,), '|u1', b'\0' * 2**26), compression=zipfile.ZIP_DEFLATED),
    'a bomb of LZMA': lambda: npz(
        array((2**26,), '|u1', b'\0' * 2**26), compression=zipfile.ZIP_LZMA
    ),
    'many members': lambda: npz(array((), data=b'\0' * 4), count=10_000),
    'no array': lambda: npz(b'text'),
    'an empty member': lambda: npz(b''),
}


@pytest.mark.parametrize('make', NPZ.values(), ids=NPZ)
def test_a_hostile_numpy_archive_is_refused_at_once(tmp_path, make):
    (tmp_path / 'a.npz').write_bytes(make())
    refused(tmp_path / 'a.npz')


def test_arrays_that_compress_well_are_read(tmp_path):
    weights = {'w': np.random.default_rng(0).normal(size=9999), 'b': np.zeros(99_999, np.float32)}
    np.savez_compressed(tmp_path / 'a.npz', **weights)
    assert files.read(tmp_path / 'a.npz').tensors.shapes == {'w': (9999,), 'b': (99_999,)}


def test_an_array_that_is_damaged_is_a_sentence_when_it_is_read(tmp_path):
    np.savez(tmp_path / 'a.npz', x=np.arange(99.0))
    data = (tmp_path / 'a.npz').read_bytes()
    (tmp_path / 'a.npz').write_bytes(data.replace(np.float64(7).tobytes(), np.float64(8).tobytes()))
    with pytest.raises(errors.UserError, match=r'a.npz is damaged.*CRC'):
        files.read(tmp_path / 'a.npz').tensors['x']


@pytest.mark.parametrize(
    'at, value',
    [(10, b'\xff\xff'), (12, b'\xfe\xff\xff\xff'), (16, b'\xfe\xff\xff\xff'), (12, b'\0' * 4)],
    ids=['count', 'size of the directory', 'its offset', 'no directory'],
)
@pytest.mark.parametrize('suffix', ['pth', 'npz'])
def test_a_zip_whose_end_lies_is_refused_at_once(tmp_path, suffix, at, value):
    path = tmp_path / f'a.{suffix}'
    if suffix == 'npz':
        path.write_bytes(npz(array((2,), data=b'\0' * 8)))
    else:
        archive(path, named(tensor()), [('0', b'\0' * 4)])
    lie(path, at, value)
    if at == 10:  # zipfile does not read it
        assert len(files.read(path).tensors) == 1
    else:
        refused(path)


@pytest.mark.parametrize('suffix', ['pth', 'npz'])
@pytest.mark.parametrize('size', [b'\xff' * 8, b'\xff' * 7 + b'\x7f', b'\0\0\0\0\0\1\0\0'], ids=str)
def test_a_size_in_64_bits_beyond_the_file_is_refused_at_once(tmp_path, suffix, size):
    path, mark = tmp_path / f'a.{suffix}', b'\1\0\x10\0' + b'S' * 16
    with zipfile.ZipFile(path, 'w') as file:
        info = zipfile.ZipInfo('a/data.pkl')
        info.extra = mark
        file.writestr(info, named(tensor()))
    data = bytearray(path.read_bytes().replace(mark, mark[:4] + size * 2))
    start = data.rindex(b'PK\1\2')
    data[start + 20 : start + 28] = b'\xff' * 8  # both sizes are in the extra field
    path.write_bytes(data)
    refused(path)


def test_a_zip_of_many_members_is_refused_at_once(tmp_path):
    path = tmp_path / 'a.pth'
    with zipfile.ZipFile(path, 'w') as file:
        file.writestr('a/data.pkl', named(tensor()))
    data = path.read_bytes()
    start, end = data.index(b'PK\1\2'), data.rindex(b'PK\5\6')
    entries = data[start:end] * 100_000
    path.write_bytes(data[:start] + entries + data[end:])
    lie(path, 12, struct.pack('<I', len(entries)))
    assert 'a directory of' in refused(path)


# safetensors


def safetensors(path, header, data=b'', length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(header) if length is None else length
    path.write_bytes(struct.pack('<Q', length) + header + data)


def entry(shape, start=0, end=0, dtype='F32'):
    return {'x\n': dict(dtype=dtype, shape=shape, data_offsets=[start, end])}


HEADERS = {
    'a header of exabytes': dict(header=b'{}', length=2**62),
    'a header of 99 MB': dict(header=b'{}', length=99 * 10**6),
    'a deep header': dict(header=b'{"a":' * 200_000),
    'a long header': dict(header=b'{' + b' ' * (3 << 20) + b'}'),
    'many tensors': dict(header={f'{i}': entry([0])['x\n'] for i in range(100_000)}),
    'exabytes': dict(header=entry([2**60], 0, 2**62)),
    'an overflowing shape': dict(header=entry([2**62, 4], 0, 8), data=b'\0' * 8),
    'an empty tensor of an overflowing shape': dict(header=entry([2**62, 2**62, 0])),
    'a tensor of many dimensions': dict(header=entry([1] * 10**5, 0, 4), data=b'\0' * 4),
    'a type of numbers with a long name': dict(header=entry([0], dtype='F' * 10**6)),
    'no object': dict(header=b'[]'),
}


@pytest.mark.parametrize('case', HEADERS.values(), ids=HEADERS)
def test_a_hostile_header_is_refused_at_once(tmp_path, case):
    safetensors(tmp_path / 'a.safetensors', **case)
    refused(tmp_path / 'a.safetensors')


# Folders and what is no file


def fifo(path):
    os.mkfifo(path)


def bound(path):
    with contextlib.chdir(path.parent):  # a socket's whole path may be short only
        socket.socket(socket.AF_UNIX).bind(path.name)


@pytest.mark.parametrize('make', [fifo, bound, os.mkdir])
@pytest.mark.parametrize(
    'name', ['model.safetensors', files.EXTRA, 'config.json', 'preprocessor_config.json', 'a.pth']
)
def test_a_pipe_a_socket_or_a_folder_is_not_waited_for(tmp_path, make, name):
    weights = 'b.npz' if name == 'a.pth' else 'model.safetensors'
    if name not in ('a.pth', weights):
        files.write(tmp_path / weights, {'x': np.ones(2, np.float32)})
    make(tmp_path / name)
    assert f'{name} is a' in refused(tmp_path)
    if make is not os.mkdir:
        refused(tmp_path / name if name == 'a.pth' else tmp_path)


@pytest.mark.parametrize('device', ['/dev/zero', '/dev/null', '/dev/tty'])
def test_a_device_is_not_read(tmp_path, device):
    (tmp_path / 'a.pth').symlink_to(device)
    assert 'a device' in refused(tmp_path / 'a.pth')


def test_links_in_a_circle_are_nothing(tmp_path):
    (tmp_path / 'a.pth').symlink_to('b.pth')
    (tmp_path / 'b.pth').symlink_to('a.pth')
    refused(tmp_path / 'a.pth')
    refused(tmp_path)
    (tmp_path / 'down').mkdir()
    (tmp_path / 'down' / 'up').symlink_to('..')
    with at_once(), pytest.raises(errors.UserError, match='neither a run nor weights'):
        files.read(tmp_path / 'down' / 'up' / 'down')


@pytest.mark.parametrize(
    'name',
    [
        *('../secret.safetensors', '/etc/passwd', 'down/a.safetensors', './a.safetensors', '..'),
        *('model.safetensors.index.json', '', 'a\0.safetensors', '\x1b[2J.pth', 'config.json'),
        *(None, 7, ['a.safetensors'], {'a': 1}, [[[]]]),
    ],
    ids=repr,
)
def test_an_index_names_files_of_weights_in_its_folder_alone(tmp_path, name):
    folder = tmp_path / 'folder'
    folder.mkdir()
    files.write(tmp_path / 'secret.safetensors', {'x': np.ones(2, np.float32)})
    files.write(folder / 'a.safetensors', {'x': np.ones(2, np.float32)})
    index = folder / 'model.safetensors.index.json'
    index.write_text(json.dumps({'weight_map': {'x': name}}))
    assert 'which is no file of weights in the same folder' in refused(folder)


JSON = {
    'a deep list': b'[' * 10**6,
    'a deep object': b'{"a":' * 10**6,
    'a deep object that ends': b'{"a":' * 10**5 + b'1' + b'}' * 10**5,
    'a number of a million digits': b'{"a":' + b'9' * 10**6 + b'}',
    'much': b'{"a":[' + b'1,' * (3 << 20) + b'1]}',
    'no object': b'[]',
    'pairs': b'[["a", 1]]',
    'no text': b'\xff\xfe\x00',
    'nothing': b'',
}


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors.index.json'])
@pytest.mark.parametrize('data', JSON.values(), ids=JSON)
def test_hostile_json_is_refused_at_once(tmp_path, name, data):
    if name == 'config.json':
        files.write(tmp_path / 'model.safetensors', {'x': np.ones(2, np.float32)})
    (tmp_path / name).write_bytes(data)
    assert name in refused(tmp_path)


def test_an_index_of_many_shards_is_refused_at_once(tmp_path):
    names = {f'{i}': f'{i}.safetensors' for i in range(50_000)}
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': names}))
    assert '50,000 shards' in refused(tmp_path)


def test_a_missing_file_in_a_full_folder_is_named_at_once(tmp_path):
    for i in range(3000):
        (tmp_path / f'model_of_a_long_name_{i}.safetensors').touch()
    refused(tmp_path / 'model_of_a_long_nameless.safetensors')
