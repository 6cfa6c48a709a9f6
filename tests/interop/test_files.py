# SPDX-License-Identifier: Apache-2.0
"""Files of weights: what is read, what is refused and with which words, and nothing half done."""

import argparse
import json
import os
import pickle
import zipfile

import numpy as np
import pytest

from ssl_jax.interop import files
from ssl_jax.run import storage

TREE = {
    'norm.weight': np.arange(6, dtype=np.float32) / 7,
    'blocks.0.attn.qkv.weight': np.arange(24, dtype=np.float32).reshape(6, 4) - 3.3,
}


@pytest.fixture(scope='module')
def torch():
    return pytest.importorskip('torch')


def tensors(torch, dtype=None):
    return {k: torch.tensor(v, dtype=dtype) for k, v in TREE.items()}


def assert_tree(file, want=TREE):
    assert sorted(file.tensors) == sorted(want)
    for name, value in want.items():
        x = file.tensors[name]
        assert x.dtype == value.dtype
        np.testing.assert_array_equal(x, value)


def refused(path):
    """The one sentence with which `path` is refused."""
    with pytest.raises(ValueError) as error:
        files.read(path)
    text = str(error.value)
    assert str(path.name) in text and '\n' not in text
    return text


# What is read


def test_safetensors_come_back_bit_by_bit(tmp_path):
    files.write(tmp_path / 'a.safetensors', TREE, {'format': 'pt'})
    file = files.read(tmp_path / 'a.safetensors')
    assert_tree(file)
    assert file.metadata == {'format': 'pt'}
    assert file.tensors.shapes == {k: v.shape for k, v in TREE.items()}


def test_our_safetensors_are_those_of_the_library(tmp_path):
    library = pytest.importorskip('safetensors.numpy')
    transposed = {k: v.T for k, v in TREE.items()}  # not contiguous
    files.write(tmp_path / 'a.safetensors', transposed, {'format': 'pt'})
    back = library.load_file(tmp_path / 'a.safetensors')
    assert all(np.array_equal(back[k], transposed[k]) for k in TREE)
    library.save_file(TREE, tmp_path / 'b.safetensors')
    assert_tree(files.read(tmp_path / 'b.safetensors'))


@pytest.mark.parametrize('name', ['bfloat16', 'float16', 'float64'])
@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_other_floats_become_float32_as_torch_converts_them(torch, tmp_path, name, suffix):
    dtype, path = getattr(torch, name), tmp_path / f'a.{suffix}'
    x = torch.randn(300, dtype=torch.float64).to(dtype)
    if suffix == 'pth':
        torch.save({'x': x}, path)
    else:
        pytest.importorskip('safetensors.torch').save_file({'x': x}, path)
    got = files.read(path).tensors['x']
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, x.float().numpy())


def test_bfloat16_is_written_rounded_to_nearest_even(torch, tmp_path):
    library = pytest.importorskip('safetensors.torch')
    x = np.random.default_rng(0).normal(size=999).astype(np.float32)
    files.write(tmp_path / 'a.safetensors', {'x': x}, dtype='bfloat16')
    got = library.load_file(tmp_path / 'a.safetensors')['x']
    assert torch.equal(got, torch.tensor(x).bfloat16())


def test_a_checkpoint_of_torch_with_options_and_optimizer_is_read(torch, tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    best = np.float64(3.5)
    state = dict(
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        args=argparse.Namespace(lr=1e-3, out='x'),
        epoch=3,
        best=best,
    )
    torch.save(state, tmp_path / 'c.pth')
    file = files.read(tmp_path / 'c.pth')
    assert file.taken == 'model'
    assert_tree(file, {k: v.numpy() for k, v in model.state_dict().items()})


def test_views_parameters_and_shared_storages_are_read(torch, tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        'view': base[1:, ::2],
        'transposed': base.T,
        'parameter': torch.nn.Parameter(base),
        'expanded': torch.ones(1, 3).expand(2, 3),
        'empty': torch.zeros(0, 3),
        'scalar': torch.tensor(5),
    }
    torch.save(state, tmp_path / 'v.pt')
    assert_tree(files.read(tmp_path / 'v.pt'), {k: v.detach().numpy() for k, v in state.items()})


@pytest.mark.parametrize(
    'wrap,taken',
    [
        (lambda t: t, ''),
        (lambda t: {'state_dict': t, 'epoch': 1}, 'state_dict'),
        (lambda t: {'student': {'x': t['norm.weight']}, 'teacher': t}, 'teacher'),
        (lambda t: {'model': {'teacher': t}}, 'model/teacher'),
        (lambda t: {'model': {f'module.{k}': v for k, v in t.items()}}, 'model'),
        (lambda t: {'teacher': {f'module.backbone.{k}': v for k, v in t.items()}}, 'teacher'),
        (lambda t: {f'_fsdp_wrapped_module.{k}': v for k, v in t.items()}, ''),
        (
            lambda t: {
                f'{p}.backbone.{k}': v for k, v in t.items() for p in ('student', 'teacher')
            },
            'teacher',
        ),
    ],
    ids=['plain', 'state_dict', 'teacher', 'nested', 'module', 'backbone', 'fsdp', 'side-by-side'],
)
def test_wrappers_are_taken_off_and_the_part_is_named(torch, tmp_path, wrap, taken):
    torch.save(wrap(tensors(torch)), tmp_path / 'w.pth')
    file = files.read(tmp_path / 'w.pth')
    assert_tree(file)
    assert file.taken == taken


def test_heads_beside_a_backbone_keep_their_names(torch, tmp_path):
    state = {'backbone.norm.weight': torch.ones(2), 'dino_head.mlp.0.weight': torch.ones(3)}
    torch.save({'teacher': state}, tmp_path / 't.pth')
    assert sorted(files.read(tmp_path / 't.pth').tensors) == [
        'dino_head.mlp.0.weight',
        'norm.weight',
    ]


def test_a_numpy_archive_is_read(tmp_path):
    np.savez(tmp_path / 'a.npz', **TREE)
    assert_tree(files.read(tmp_path / 'a.npz'))


def test_a_folder_brings_its_config_processor_and_sidecar(tmp_path):
    files.write(tmp_path / 'model.safetensors', TREE)
    files.write(tmp_path / files.EXTRA, {'mask_token': np.ones(2, np.float32)})
    (tmp_path / 'config.json').write_text('{"model_type": "vit"}')
    (tmp_path / 'preprocessor_config.json').write_text('{"size": 224}')
    for path in (tmp_path, tmp_path / 'model.safetensors'):
        file = files.read(path)
        assert_tree(file)
        assert file.hints == {'model_type': 'vit'} and file.processor == {'size': 224}
        assert list(file.extra) == ['mask_token']


def test_shards_are_joined(tmp_path):
    for i, (name, value) in enumerate(TREE.items()):
        files.write(tmp_path / f'model-{i}.safetensors', {name: value})
    names = {name: f'model-{i}.safetensors' for i, name in enumerate(TREE)}
    index = tmp_path / 'model.safetensors.index.json'
    index.write_text(json.dumps({'weight_map': names}))
    assert_tree(files.read(tmp_path))
    (tmp_path / 'model-1.safetensors').unlink()
    assert 'lacks the shard model-1.safetensors' in refused(tmp_path)


# What is refused


def damage(data, how):
    if how == 'half':
        return data[: len(data) // 2]
    if how == 'last byte':
        return data[:-1]
    if how == 'first bytes':
        return data[:5]
    return b''


@pytest.mark.parametrize('how', ['half', 'last byte', 'first bytes', 'empty'])
@pytest.mark.parametrize('suffix', ['safetensors', 'pth', 'npz'])
def test_a_truncated_file_is_refused(torch, tmp_path, suffix, how):
    path = tmp_path / f'a.{suffix}'
    if suffix == 'pth':
        torch.save(tensors(torch), path)
    elif suffix == 'npz':
        np.savez(path, **TREE)
    else:
        files.write(path, TREE)
    path.write_bytes(damage(path.read_bytes(), how))
    text = refused(path)
    assert 'damaged' in text and ('again' in text or 'save' in text)
    if suffix == 'safetensors':
        assert text.endswith('download or copy it again.')


def test_bytes_changed_in_a_pickle_never_raise_anything_else(torch, tmp_path):
    path = tmp_path / 'a.pth'
    torch.save({'model': tensors(torch), 'args': argparse.Namespace(a=1)}, path)
    data = path.read_bytes()
    start = data.index(b'data.pkl') + 8
    rng = np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(data)
        for at in rng.integers(start, start + 700, 3):
            broken[at] = rng.integers(256)
        path.write_bytes(broken)
        try:
            dict(files.read(path).tensors)
        except ValueError as error:
            assert 'a.pth' in str(error)


class Shell:
    """Pickles as a call of os.system."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f'touch {self.marker}',)


def archive(path, data):
    """A zip as torch.save writes it, around any pickle."""
    with zipfile.ZipFile(path, 'w') as file:
        file.writestr('a/data.pkl', data)
        file.writestr('a/byteorder', 'little')


@pytest.mark.parametrize('protocol', [0, 2, 4])
def test_a_file_that_holds_code_is_named_and_nothing_of_it_runs(tmp_path, protocol):
    marker = tmp_path / 'it ran'
    path = tmp_path / 'evil.pth'
    archive(path, pickle.dumps({'model': {}, 'x': Shell(f"'{marker}'")}, protocol))
    text = refused(path)
    assert 'posix.system' in text and 'none of it was run' in text
    assert not marker.exists()
    with zipfile.ZipFile(path) as file:  # the same pickle does run elsewhere
        pickle.loads(file.read('a/data.pkl'))
    assert marker.exists()


@pytest.mark.parametrize(
    'module,name',
    [
        ('builtins', 'eval'),
        ('builtins', 'getattr'),
        ('torch._utils', '_rebuild_tensor_v2.__globals__'),
        ('collections', 'OrderedDict.fromkeys'),
        ('torch.storage', '_load_from_bytes'),
        ('numpy', 'load'),
        ('ssl_jax.run.storage', 'shutil.rmtree'),
    ],
)
def test_no_function_can_be_named_but_those_of_tensors(tmp_path, module, name):
    def text(s):
        return b'\x8c' + bytes([len(s)]) + s.encode()

    data = b'\x80\x04' + text(module) + text(name) + b'\x93.'  # STACK_GLOBAL
    archive(tmp_path / 'evil.pth', data)
    assert f'{module}.{name}' in refused(tmp_path / 'evil.pth')


def test_a_pickled_module_asks_for_its_state_dict(torch, tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / 'm.pth')
    text = refused(tmp_path / 'm.pth')
    assert 'torch.nn.modules.linear.Linear' in text and 'state_dict()' in text


def test_a_torchscript_program_is_refused(torch, tmp_path):
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / 's.pt')
    assert 'TorchScript' in refused(tmp_path / 's.pt')


def test_the_old_format_of_torch_says_how_to_convert(torch, tmp_path):
    torch.save(tensors(torch), tmp_path / 'o.pth', _use_new_zipfile_serialization=False)
    assert 'torch.save(torch.load(' in refused(tmp_path / 'o.pth')


def test_tensors_cannot_reach_beyond_their_storage(torch, tmp_path):
    torch.save({'x': torch.arange(4.0)}, tmp_path / 'a.pth')
    with zipfile.ZipFile(tmp_path / 'a.pth') as file:
        members = {name: file.read(name) for name in file.namelist()}
    name = next(n for n in members if n.endswith('data.pkl'))
    assert b'K\x04\x85' in members[name]  # the shape (4,)
    members[name] = members[name].replace(b'K\x04\x85', b'K\x40\x85')
    with zipfile.ZipFile(tmp_path / 'b.pth', 'w') as file:
        for name, data in members.items():
            file.writestr(name, data)
    assert 'a tensor (64,) of a storage of 4 numbers' in refused(tmp_path / 'b.pth')


def test_an_optimizer_without_weights_is_called_so(torch, tmp_path):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    torch.save(optimizer.state_dict(), tmp_path / 'o.pth')
    assert 'optimizer' in refused(tmp_path / 'o.pth')
    torch.save({'optimizer': optimizer.state_dict(), 'epoch': 3}, tmp_path / 'p.pth')
    assert 'optimizer' in refused(tmp_path / 'p.pth')


@pytest.mark.parametrize('tree', [{}, {'epoch': 3}, [1, 2], {'model': {}}], ids=str)
def test_a_file_without_tensors_is_called_so(torch, tmp_path, tree):
    torch.save(tree, tmp_path / 'e.pth')
    text = refused(tmp_path / 'e.pth')
    assert 'no tensors' in text or 'no weights' in text


def test_the_shard_of_one_process_is_refused(torch, tmp_path):
    torch.save({'model': {'blocks.0._flat_param': torch.ones(5)}}, tmp_path / 'rank_0.pth')
    assert 'one process of an FSDP run' in refused(tmp_path / 'rank_0.pth')


def test_a_missing_path_names_its_neighbour(tmp_path):
    files.write(tmp_path / 'model.safetensors', TREE)
    with pytest.raises(ValueError, match='did you mean model.safetensors'):
        files.read(tmp_path / 'mode.safetensors')


@pytest.mark.parametrize('names', [(), ('a.pth', 'b.pth'), ('notes.txt',)], ids=str)
def test_a_folder_without_one_clear_file_is_refused(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text('x')
    text = refused(tmp_path)
    assert ('a.pth, b.pth' in text) if len(names) == 2 else ('neither a run nor weights' in text)


@pytest.mark.parametrize('content', ['<html>404</html>' * 9, 'version https://git-lfs.github.com'])
def test_a_web_page_is_no_file_of_weights(tmp_path, content):
    for name in ('a.pth', 'a.safetensors', 'a.npz'):
        (tmp_path / name).write_text(content)
        assert 'download' in refused(tmp_path / name) or name.endswith('npz')


def test_types_that_are_not_numbers_of_ours_are_named(tmp_path):
    header = json.dumps({'x': dict(dtype='F8_E4M3', shape=[2], data_offsets=[0, 2])}).encode()
    data = len(header).to_bytes(8, 'little') + header + b'\0\0'
    (tmp_path / 'q.safetensors').write_bytes(data)
    assert 'x as F8_E4M3' in refused(tmp_path / 'q.safetensors')


@pytest.mark.parametrize(
    'entry',
    [
        dict(dtype='F32', shape=[2], data_offsets=[0, 4]),
        dict(dtype='F32', shape=[-2], data_offsets=[0, 8]),
        dict(dtype='F32', shape=[2]),
        dict(dtype='F32', shape='x', data_offsets=[0, 8]),
        dict(dtype='F32', shape=[2], data_offsets=[-8, 0]),
        7,
    ],
    ids=str,
)
def test_a_header_that_lies_is_refused(tmp_path, entry):
    header = json.dumps({'x': entry}).encode()
    data = len(header).to_bytes(8, 'little') + header + b'\0' * 8
    (tmp_path / 'h.safetensors').write_bytes(data)
    assert 'damaged' in refused(tmp_path / 'h.safetensors')


# Folders are written whole


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / 'out'
    with pytest.raises(KeyError), storage.atomic_folder(target) as folder:
        (folder / 'a').write_text('new')
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with storage.atomic_folder(target) as folder:
        (folder / 'a').write_text('old')
        assert not target.exists()
    assert (target / 'a').read_text() == 'old'
    with pytest.raises(KeyError), storage.atomic_folder(target) as folder:
        (folder / 'a').write_text('new')
        raise KeyError
    assert (target / 'a').read_text() == 'old'
    with storage.atomic_folder(target) as folder:
        (folder / 'b').write_text('new')
    assert [p.name for p in target.iterdir()] == ['b']
    assert [p.name for p in tmp_path.iterdir()] == ['out']


def test_a_move_that_fails_leaves_the_old_folder(tmp_path, monkeypatch):
    target = tmp_path / 'out'
    with storage.atomic_folder(target) as folder:
        (folder / 'a').write_text('old')
    move = type(target).rename

    def rename(self, to):
        if self.name.endswith('.partial'):
            raise OSError('no space')
        return move(self, to)

    monkeypatch.setattr(type(target), 'rename', rename)
    with pytest.raises(OSError, match='no space'), storage.atomic_folder(target) as folder:
        (folder / 'b').write_text('new')
    assert [p.name for p in tmp_path.iterdir()] == ['out']
    assert (target / 'a').read_text() == 'old'
