# SPDX-License-Identifier: Apache-2.0
"""`ssl_jax check`: each thing that is wrong with a machine is a row that says what to do."""

import errno
import os
import types
from importlib import metadata
from unittest import mock

import jax
import numpy as np
import pytest

import processes
import tiny
from ssl_jax import check, cli
from ssl_jax.check import data, disk, machine, speed
from ssl_jax.check.rows import Row, lines, merge
from ssl_jax.data import sources
from ssl_jax.run import storage
from ssl_jax.run import workdir as workdir_lib


def by_name(found):
    assert len({row.what for row in found}) == len(found)
    return {row.what: row for row in found}


# Several processes as one table.


def hosts(*values, **more):
    return [(f'process {i}', [Row('matmul', x, 'TFLOP/s', **more)]) for i, x in enumerate(values)]


@pytest.mark.parametrize(
    'values, more, odd',
    [
        ((190, 191, 120, 189), {}, 'process 2: 120'),
        ((190, 191, 240, 189), {}, 'process 2: 240'),
        ((100, 60), {}, 'process 1: 60'),  # of two, the slower one
        ((60, 100), {}, 'process 0: 60'),
        ((4.0, 10.0), dict(less_is_better=True), 'process 1: 10'),
        ((4.0, 7.0), dict(less_is_better=True, odd=1.0), None),
        ((190, 191, 160, 189), {}, None),
    ],
)
def test_the_process_that_differs_from_the_median_by_a_fifth_is_named(values, more, odd):
    (row,) = merge(hosts(*values, **more))
    assert row.verdict == ('warn' if odd else 'ok')
    assert (f'odd: {odd}' in row.value) if odd else ('odd' not in row.value)
    ends = (min(values), max(values))
    assert all(f'{x:.3g}' in row.value for x in ends)


def test_a_process_of_other_versions_is_bad_and_named():
    named = [
        (f'process {i}', [Row('versions', f'jax 0.{10 + (i == 1)}', same=True)]) for i in range(3)
    ]
    (row,) = merge(named)
    assert row.verdict == 'bad' and 'odd: process 1: jax 0.11' in row.value


def test_what_is_bad_on_one_process_alone_is_named_with_what_to_do():
    good, ill = Row('workdir', 'fine'), Row('workdir', 'no such', verdict='bad', next='mount it')
    (row,) = merge([('a', [good]), ('b', [ill]), ('c', [good])])
    assert row.verdict == 'bad' and row.next == 'mount it' and row.value == 'no such; odd: b'
    # A row that only one process has.
    rows = by_name(merge([('a', []), ('b', [ill]), ('c', [])]))
    assert rows['workdir'].verdict == 'bad' and '(b)' in rows['workdir'].value


def test_the_table_of_one_process_is_its_own():
    (row,) = merge(hosts(190.4))
    assert lines([row]) == ['  ok    matmul                 190 TFLOP/s']


# The machine.


def versions(monkeypatch, **found):
    """Packages as if installed in these versions; None: missing."""
    real = metadata.version

    def version(name):
        key = name.replace('-', '_')
        if key not in found:
            return real(name)
        if found[key] is None:
            raise metadata.PackageNotFoundError(name)
        return found[key]

    monkeypatch.setattr(metadata, 'version', version)


def test_all_packages_of_a_working_installation_fit():
    assert machine.packages() == []


@pytest.mark.parametrize(
    'found, what, value, command',
    [
        (dict(grain='0.2.1'), 'grain', '0.2.1', 'grain>=0.2.17'),
        (dict(orbax_checkpoint='0.13.1'), 'orbax-checkpoint', '0.13.1', '<0.13'),
        (dict(simplejpeg=None), 'simplejpeg', 'missing', 'simplejpeg'),
        (dict(jaxlib='0.4.1'), 'jaxlib', '0.4.1', 'jaxlib'),
        (dict(libtpu='0.0.1'), 'libtpu', '0.0.1', 'libtpu=='),
        (dict(jax_cuda12_plugin='0.4.1'), 'jax-cuda12-plugin', '0.4.1', 'jax-cuda12-plugin'),
        (dict(ssl_jax=None), 'ssl_jax', 'not installed', 'pip install -e'),
    ],
)
def test_a_package_that_does_not_fit_is_named_with_the_command(
    monkeypatch, found, what, value, command
):
    versions(monkeypatch, **found)
    row = by_name(machine.packages())[f'package {what}']
    assert row.verdict == 'bad' and row.value == value and command in row.next


def machine_with(monkeypatch, chips=0, gpus=0, platforms='', **found):
    monkeypatch.setattr(machine, 'tpu_chips', lambda: chips)
    monkeypatch.setattr(machine, 'num_gpus', lambda: gpus)
    monkeypatch.setenv('JAX_PLATFORMS', platforms)
    plugins = dict.fromkeys(('libtpu', 'jax_cuda12_plugin', 'jax_cuda13_plugin'))
    versions(monkeypatch, **{**plugins, **found})


@pytest.mark.parametrize(
    'here, driver, text, fix',
    [
        (dict(chips=4), None, 'libtpu is missing', "pip install 'ssl_jax[tpu]'"),
        (dict(chips=4, libtpu='0.0.42'), None, 'libtpu 0.0.42 did not start', 'lsof'),
        (dict(gpus=8), '580.159', 'CUDA is missing', "pip install 'jax[cuda13]'"),
        (dict(gpus=1), '550.54', 'CUDA is missing', "pip install 'jax[cuda12]'"),
        (dict(), '550.54', '1 NVIDIA GPU(s), and jax', "pip install 'jax[cuda12]'"),
        (dict(gpus=1, jax_cuda12_plugin='0.10.2'), '550.54', '0.10.2 did not start', 'jax.devices'),
    ],
)
def test_chips_that_jax_would_silently_not_use_are_bad(monkeypatch, here, driver, text, fix):
    machine_with(monkeypatch, **here)
    row = machine.accelerator('cpu', driver)
    assert row.verdict == 'bad' and text in row.value and fix in row.next


def test_chips_that_are_switched_off_by_hand_are_a_warning(monkeypatch):
    machine_with(monkeypatch, chips=4, libtpu='0.0.42', platforms='cpu')
    row = machine.accelerator('cpu', None)
    assert row.verdict == 'warn' and row.next == 'unset JAX_PLATFORMS'


def test_a_cpu_without_chips_is_fine(monkeypatch):
    machine_with(monkeypatch)
    row = machine.accelerator('cpu', None)
    assert row.verdict == 'ok' and row.value == '8 x cpu'


def test_a_driver_too_old_for_the_plugin_is_bad(monkeypatch):
    machine_with(monkeypatch, gpus=1, jax_cuda13_plugin='0.10.2')
    row = machine._driver('550.54')
    assert row.verdict == 'bad' and '580' in row.expected and 'cuda12' in row.next
    assert machine._driver('580.159.04').verdict == 'ok'


def test_a_driver_that_does_not_answer_is_a_row(monkeypatch):
    answer = types.SimpleNamespace(returncode=9, stdout='', stderr='NVIDIA-SMI has failed\n')
    monkeypatch.setattr(machine.shutil, 'which', lambda name: f'/usr/bin/{name}')
    monkeypatch.setattr(machine.subprocess, 'run', lambda *_, **__: answer)
    found = []
    machine.rows(found)
    row = by_name(found)['driver']
    assert row.verdict == 'bad' and 'code 9: NVIDIA-SMI has failed' in row.value


# Devices.


def test_rates_of_real_devices_are_positive():
    found = []
    speed.rows(found, seconds=0.01)
    speed.links(found)
    found = by_name(found)
    assert {'matmul', 'memory bandwidth', 'sum in one process'} == found.keys()
    assert all(row.value > 0 for row in found.values())


@pytest.mark.parametrize(
    'share, verdict', [(0.9, 'ok'), (0.4, 'warn'), (0.1, 'bad')], ids=lambda x: str(x)
)
def test_a_product_is_measured_against_the_peak(share, verdict):
    device = types.SimpleNamespace(device_kind='TPU v5 lite')
    row = speed._rate('matmul', {0: share * 197e12, 1: share * 197e12}, device)
    assert row.verdict == verdict and '197' in row.expected and bool(row.next) == (verdict != 'ok')


def test_a_slow_device_among_others_of_a_host_is_named():
    device = types.SimpleNamespace(device_kind='unknown')
    row = speed._rate('matmul', {4: 2e14, 5: 1e14, 6: 2e14}, device)
    assert row.verdict == 'warn' and 'slowest is device 5' in row.expected


def test_an_error_of_a_device_is_a_row_and_the_others_follow(monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of\nmemory')

    monkeypatch.setattr(speed, 'matmul', full)
    found = []
    speed.rows(found, seconds=0.0)
    found = by_name(found)
    assert found['matmul'].verdict == 'bad' and 'EXHAUSTED: out of memory' in found['matmul'].value
    assert found['memory bandwidth'].verdict == 'ok'


class Choice(types.ModuleType):
    """A stand-in of `kernels.choice`: one verdict for each call."""

    def __init__(self, *verdicts):
        super().__init__('choice')
        self.verdicts = dict(enumerate(verdicts))
        self.typical, self.words = lambda: [*self.verdicts], 'attention {}'.format

    def measure(self, calls, **_):
        names = ('form', 'used', 'reason', 'seconds', 'reference_seconds')
        return [types.SimpleNamespace(**dict(zip(names, self.verdicts[c], strict=True)))
                for c in calls]  # fmt: skip


def kernel_rows(monkeypatch, *verdicts, seconds=10.0):
    monkeypatch.setattr(speed, 'choice', Choice(*verdicts))
    found = []
    speed.kernels(found, seconds)
    return [(row.what, row.text(), row.verdict) for row in found]


def test_each_kernel_has_its_verdict_and_a_failing_one_is_a_warning(monkeypatch):
    found = kernel_rows(
        monkeypatch,
        ('flash', True, 'faster', 1e-3, 2e-3),
        ('flash', False, 'not faster', 3e-3, 2e-3),
        ('flash', False, 'does not fit', None, None),
        ('flash', False, 'wrong', None, None),
        ('flash', False, 'JaxRuntimeError: no', None, None),
    )
    assert found == [
        ('attention 0: flash', "1 ms, XLA's 2; used", 'ok'),
        ('attention 1: flash', "3 ms, XLA's 2; not faster", 'ok'),
        ('attention 2: flash', 'does not fit', 'ok'),
        ('attention 3: flash', 'wrong', 'warn'),
        ('attention 4: flash', 'JaxRuntimeError: no', 'warn'),
    ]


def test_kernels_that_there_is_no_time_for_are_counted(monkeypatch):
    found = kernel_rows(monkeypatch, *[('flash', True, 'faster', 1.0, 2.0)] * 3, seconds=0.0)
    assert [text for _, text, _ in found] == ['3 operations not measured, for want of time']


# The workdir.


def disk_rows(path, *args):
    found = []
    disk.rows(found, path, *args)
    return by_name(found)


@pytest.fixture(autouse=True)
def small_file(monkeypatch):
    monkeypatch.setattr(disk, 'LARGE', 2**16)


def test_a_sound_workdir_is_left_as_it_was(tmp_path):
    (tmp_path / 'w').mkdir()
    (tmp_path / 'w' / 'mine').write_text('x')
    for path in (tmp_path / 'w', tmp_path / 'new' / 'deep'):
        found = disk_rows(path)
        assert {row.verdict for row in found.values()} == {'ok'}
        assert {'write 64 MB', 'read it back', 'write 4 kB', 'list', 'lock'} < found.keys()
    assert sorted(p.name for p in tmp_path.rglob('*')) == ['mine', 'w']


def test_a_new_workdir_that_another_process_still_checks_stays(tmp_path, monkeypatch):
    real, other = storage.atomic_write, tmp_path / 'w' / '.check-1-1'

    def write(path, data):
        other.mkdir(exist_ok=True)
        real(path, data)

    monkeypatch.setattr(storage, 'atomic_write', write)
    assert {row.verdict for row in disk_rows(tmp_path / 'w').values()} == {'ok'}
    assert [*(tmp_path / 'w').iterdir()] == [other]


@pytest.mark.parametrize('code', [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_a_workdir_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch, code):
    def refused(path, data):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(storage, 'atomic_write', refused)
    row = disk_rows(tmp_path)['workdir']
    assert row.verdict == 'bad' and os.strerror(code) in row.value and '--workdir' in row.next
    assert not any(tmp_path.iterdir())


def test_a_workdir_below_a_file_is_a_row(tmp_path):
    (tmp_path / 'file').write_text('x')
    found = disk_rows(tmp_path / 'file' / 'w')
    assert found['workdir'].verdict == found['lock'].verdict == 'bad'
    assert 'Not a directory' in found['workdir'].value


def test_a_disk_that_gives_back_other_bytes_is_bad(tmp_path, monkeypatch):
    real = storage.atomic_write
    monkeypatch.setattr(storage, 'atomic_write', lambda path, data: real(path, data[:-1]))
    row = disk_rows(tmp_path)['workdir']
    assert row.verdict == 'bad' and 'not what was written' in row.value


def test_a_file_system_without_locks_is_bad(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EIO, 'Input/output error')

    monkeypatch.setattr(workdir_lib.fcntl, 'flock', refused)
    found = disk_rows(tmp_path)
    assert found['lock'].verdict == 'bad' and found['write 4 kB'].verdict == 'ok'


def test_a_workdir_in_use_is_said(tmp_path):
    with workdir_lib.lock(tmp_path):
        row = disk_rows(tmp_path)['workdir in use']
    assert row.verdict == 'warn' and 'run.lock' in row.value


def test_a_sound_bucket_is_left_as_it_was(bucket):
    found = disk_rows(f'{bucket.root}/w')
    assert {row.verdict for row in found.values()} == {'ok'}
    assert {'write 64 MB', 'read it back', 'write 4 kB', 'list', 'lock'} == found.keys()
    assert storage.names(bucket.root) == []


def test_a_bucket_that_may_not_be_written_is_bad_with_what_to_do(bucket, monkeypatch):
    monkeypatch.setenv('SSL_JAX_BUCKET_PATIENCE', '1')
    bucket.fault(status=403, methods='POST,PUT')
    found = disk_rows(f'{bucket.root}/w')
    assert found['workdir'].verdict == found['lock'].verdict == 'bad'
    assert 'access is forbidden' in found['workdir'].value and 'account' in found['lock'].next


def test_an_absent_bucket_is_named(bucket):
    row = disk_rows('gs://no-such-bucket/w')['workdir']
    assert row.verdict == 'bad' and 'no-such-bucket' in row.value and 'http' not in row.value


@pytest.mark.parametrize('free, verdict', [(100, 'ok'), (25, 'warn'), (15, 'bad')])
def test_space_is_measured_against_the_checkpoints(tmp_path, monkeypatch, free, verdict):
    usage = types.SimpleNamespace(free=free)
    monkeypatch.setattr(disk.shutil, 'disk_usage', lambda _: usage)
    row = disk_rows(tmp_path, 10, 2)['free space']
    assert row.verdict == verdict and row.expected.startswith('2 checkpoints')


# Images and the step.


@pytest.mark.parametrize(
    'loaded, verdict', [(2000.0, 'ok'), (1000.0, 'ok'), (700.0, 'warn'), (300.0, 'bad')]
)
def test_the_loader_is_measured_against_the_step(loaded, verdict):
    row = data.against(loaded, 1000.0, None)
    assert row.verdict == verdict and bool(row.next) == (verdict != 'ok')
    assert row.value == pytest.approx(loaded / 1000)


def test_too_few_threads_are_the_first_thing_to_mend(monkeypatch):
    monkeypatch.setattr(data.launch, 'cores', lambda: 16)
    assert 'data.num_threads is 4 on 16 cores' in data.against(1.0, 2.0, 4).next
    assert 'data.num_threads=64' in data.against(1.0, 2.0, None).next


def test_images_that_cannot_be_decoded_are_counted():
    images = [b'no image' if i < 3 else np.zeros((40, 40, 3), np.uint8) for i in range(64)]
    trial = mock.Mock(source=sources.Arrays(images), config=tiny.config())
    trial.method.views.return_value = data.methods.make(tiny.config()).views()
    trial.method.repeats = 1
    found = []
    rate = data.rows(found, trial, seconds=0.3)
    found = by_name(found)
    assert rate > 0 and found['loader'].value == rate
    assert found['bad images'].verdict == 'bad' and found['bad images'].value.startswith('3 of')


def test_a_step_that_takes_too_long_on_a_cpu_is_not_measured(monkeypatch):
    trial = data.Trial(tiny.config())
    monkeypatch.setattr(data, 'CPU_SECONDS', 1e-9)
    found = []
    data.step(found, trial, 100.0, True)
    assert [row.what for row in found] == ['step'] and 'not measured' in found[0].value
    found = []
    data.step(found, trial, 100.0, False)
    assert found == []


# The command.


@pytest.fixture
def fast(monkeypatch):
    """No time for rates."""
    monkeypatch.setattr(speed, 'rows', lambda found: None)
    monkeypatch.setattr(speed, 'links', lambda found: None)
    monkeypatch.setattr(data.rows, '__defaults__', (0.2,))
    monkeypatch.setattr(data, 'ENOUGH', 0)  # the machine may be busy


def command(capsys, *args):
    """(exit code, output) of `ssl_jax check`."""
    with pytest.raises(SystemExit) as end:
        cli.main(['check', *map(str, args)])
    return int(end.value.code), capsys.readouterr().out


def test_the_command_measures_all_and_ends_with_0(fast, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(check.config_lib, 'load', lambda *_: tiny.config())
    code, out = command(capsys, '--config', 'tiny', '--workdir', tmp_path)
    assert code == 0 and 'nothing is bad' in out and 'bad  ' not in out, out
    for what in ('CPU cores', 'versions', 'kernels', 'images', 'loader', 'step', 'lock'):
        assert f'ok    {what}' in out, out
    assert not any(tmp_path.iterdir())


def test_without_data_and_workdir_it_says_what_is_left_out(fast, capsys):
    code, out = command(capsys)
    assert code == 0 and 'not checked: workdir' in out and 'not checked: data' in out


@pytest.mark.parametrize('kind', ['absent', 'empty', 'text'])
def test_no_images_are_a_bad_row_and_code_1(fast, capsys, tmp_path, kind):
    path = tmp_path / 'images'
    if kind != 'absent':
        path.mkdir()
    if kind == 'text':
        (path / 'a.txt').write_text('x')
    code, out = command(capsys, '--data', path, '--workdir', tmp_path / 'w')
    assert code == 1 and 'bad   data' in out and str(path) in out and '1 bad: data' in out
    assert 'ok    lock' in out  # the rest is checked all the same


@pytest.mark.parametrize(
    'args, message',
    [
        (['--config', 'scene_mae'], 'scenes_mae'),
        (['--data', 'd', '--config', 'scenes_mae', '--method', 'mae'], 'both name a recipe'),
        (['--method', 'mae'], 'give one of them'),
        (['--config', 'scenes_mae', 'batchsize=3'], 'batch_size'),
    ],
    ids=lambda x: ' '.join(x) if isinstance(x, list) else '',
)
def test_a_mistake_in_the_command_is_one_sentence(args, message, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(['check', *args])
    err = capsys.readouterr().err.strip()
    assert end.value.code == 1 and message in err and len(err.splitlines()) == 1, err


# Two processes over loopback.

TWO = """
    import os
    from ssl_jax import check
    from ssl_jax.check import disk, machine, speed
    from ssl_jax.run import launch, peers
    launch.initialize_distributed()
    me = int(os.environ['JAX_PROCESS_ID'])
    disk.LARGE = 2**16
    speed.matmul = lambda *_: 1e14 / (1 + me)
    speed.memory = lambda *_: 1e9
    {act}
    print('SOUND', check.run({workdir!r}), flush=True)
    {then}
"""


def twice(tmp_path, act='pass', then='pass'):
    code = TWO.format(workdir=str(tmp_path / 'w'), act=act, then=then)
    both = processes.twice(code, 1)
    try:
        return [processes.finish(p, timeout=200) for p in both]
    finally:
        for process in both:
            process.kill()


def test_two_processes_print_one_table_that_names_the_slow_one(tmp_path):
    # Once more without links, as where only jax knows the other processes.
    found = twice(tmp_path, then='peers.joined = lambda: False; check.run()')
    assert [code for code, _ in found] == [0, 0], found
    linked, _, alone = found[0][1].partition('SOUND True')
    for out in (linked, alone):
        (line,) = [line for line in out.splitlines() if ' matmul ' in line]
        assert line.split()[0] == 'warn' and '50 / 100 / 100 TFLOP/s' in line
        assert 'odd: process 1 (' in line and '): 50' in line
        assert 'sum over all' in out and '1 x cpu; 2 in 2 processes' in out
    assert 'ok    lock' in linked and 'nothing is bad' in linked
    assert 'matmul' not in found[1][1] and 'SOUND True' in found[1][1]


def test_a_process_of_another_jax_is_named_before_the_devices_meet(tmp_path):
    act = "machine._versions = lambda: f'jax 0.1{me}'"
    found = twice(tmp_path, act)
    assert [code for code, _ in found] == [0, 0] and all('SOUND False' in o for _, o in found)
    out = found[0][1]
    assert 'bad   versions               jax 0.10; odd: process 1 (' in out, out
    assert 'sum over all' not in out and 'not checked: sums over devices' in out
    assert 'ok    write 4 kB' in out  # what each does for itself is checked all the same
