# SPDX-License-Identifier: Apache-2.0
"""The rows of a run in a bucket: in parts while it runs, joined at its end."""

import io
import time

import pytest

from ssl_jax.run import bucket as bucket_lib
from ssl_jax.run import metrics, rows, storage, uploads


@pytest.fixture(autouse=True)
def queue(monkeypatch):
    monkeypatch.setattr(uploads, '_queue', uploads._Queue())


def write(workdir, first, last, start_step=None):
    """Rows of the steps first .. last, in the bucket but not joined, as after a kill."""
    found = rows.Rows(workdir, first - 1 if start_step is None else start_step)
    for step in range(first, last + 1):
        found.add({'step': step, 'loss': 1 / step})
    assert uploads.flush()
    return found


def steps(workdir):
    return [row['step'] for row in metrics.read(workdir)]


def test_a_reader_sees_the_rows_of_a_run_that_goes_on(bucket):
    write(bucket.root, 1, 5)
    assert steps(bucket.root) == steps(f'{bucket.root}/metrics.jsonl') == [1, 2, 3, 4, 5]
    assert metrics.has_evaluation(bucket.root, 5) is False


def test_rows_are_not_written_from_the_start_at_every_row(bucket, monkeypatch):
    monkeypatch.setattr(rows, 'PART_BYTES', 300)
    found = write(bucket.root, 1, 100)
    sizes = [o.size for o in bucket_lib.walk(f'{bucket.root}/metrics')]
    assert len(sizes) > 9 and max(sizes) < 400
    bucket.requests()
    found.add({'step': 101})
    assert uploads.flush()
    assert bucket.requests() == {'POST upload': 1}
    assert steps(bucket.root) == list(range(1, 102))


def test_at_the_end_all_rows_are_in_one_file(bucket, monkeypatch):
    monkeypatch.setattr(rows, 'PART_BYTES', 300)
    write(bucket.root, 1, 20).close()
    assert uploads.flush()
    assert storage.names(bucket.root) == ['metrics.jsonl']
    assert len(storage.read_lines(f'{bucket.root}/metrics.jsonl')) == 20
    assert steps(bucket.root) == list(range(1, 21))


@pytest.mark.parametrize('saved', [0, 3, 7, 10])
def test_a_run_that_was_killed_continues_with_the_rows_up_to_its_checkpoint(
    bucket, monkeypatch, saved
):
    monkeypatch.setattr(rows, 'PART_BYTES', 150)
    write(bucket.root, 1, 5)
    write(bucket.root, 6, 10)
    assert steps(bucket.root) == list(range(1, 11))
    write(bucket.root, saved + 1, 12)
    assert steps(bucket.root) == list(range(1, 13))


def test_a_kill_while_the_parts_are_joined_doubles_no_row(bucket, monkeypatch):
    monkeypatch.setattr(rows, 'PART_BYTES', 150)
    found = write(bucket.root, 1, 10)
    text = storage.read(found.path)
    bucket_lib.write(f'{bucket.root}/metrics.jsonl', text)
    assert steps(bucket.root) == list(range(1, 11))
    write(bucket.root, 11, 12)
    assert steps(bucket.root) == list(range(1, 13))


def test_a_workdir_that_was_copied_from_a_bucket_in_mid_run_is_read_and_continued(bucket, tmp_path):
    write(bucket.root, 1, 3)
    write(bucket.root, 4, 6)
    for found in bucket_lib.walk(bucket.root):
        storage.atomic_write(tmp_path / found.name, storage.read(f'{bucket.root}/{found.name}'))
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    write(tmp_path, 6, 7)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
    assert len(storage.read_lines(tmp_path / 'metrics.jsonl')) == 7


def test_rows_of_a_bucket_equal_those_of_a_disk(bucket, tmp_path):
    for workdir in (bucket.root, tmp_path):
        write(workdir, 1, 7).close()
    assert uploads.flush()
    assert storage.read(f'{bucket.root}/metrics.jsonl') == (tmp_path / 'metrics.jsonl').read_bytes()


def writer(workdir, **more):
    options = dict(total_steps=100, batch_size=64, stream=io.StringIO())
    return metrics.Writer(workdir, **{**options, **more})


def test_rows_and_events_are_in_the_bucket_before_a_checkpoint_is_saved(bucket):
    found = writer(bucket.root)
    found.log(1, {'loss': 0.5})
    found.flush()
    assert steps(bucket.root) == [1]
    (name,) = storage.names(f'{bucket.root}/tensorboard')
    assert b'images_per_second' in storage.read(f'{bucket.root}/tensorboard/{name}')
    found.close()


@pytest.mark.parametrize('rules', [{'hang': 1}, {'status': 503}, {'status': 403}])
def test_no_outage_stops_or_holds_up_a_run(bucket, monkeypatch, rules):
    monkeypatch.setattr(uploads, 'FLUSH_SECONDS', 0.2)
    monkeypatch.setattr(uploads, 'SECONDS', 0.01)
    found = writer(bucket.root)
    bucket.fault(**rules)
    began = time.monotonic()
    for step in range(1, 301):
        found.log(step, {'loss': 1 / step})
        if step % 100 == 0:
            found.flush()
            found.eval(step, {'knn': 0.5})
    assert time.monotonic() - began < 3 * 5  # three waits of the bucket's patience are longer
    bucket.heal()
    found.close()
    assert len(metrics.read(bucket.root)) == 303
    assert len(storage.read(f'{bucket.root}/metrics.jsonl').splitlines()) == 303


def test_a_restart_has_its_own_events_and_hides_those_after_its_checkpoint(bucket):
    event_pb2 = pytest.importorskip('tensorboardX.proto.event_pb2')
    for start in (0, 3):
        add, close = rows.events(bucket.root, start)
        for step in (start + 1, start + 2, start + 3, start + 4):
            add(step, {'loss': 0.5, 'bad': float('nan')})
        close()
        assert uploads.flush()
        time.sleep(0 if start else 1.1)  # names have the second
    first, second = storage.names(f'{bucket.root}/tensorboard')
    found = [_events(storage.read(f'{bucket.root}/tensorboard/{n}')) for n in (first, second)]
    assert [e.step for e in found[0] if e.summary.value] == [1, 2, 3, 4]
    assert [v.tag for e in found[0] for v in e.summary.value] == ['loss'] * 4
    (start,) = (e for e in found[1] if e.HasField('session_log'))
    assert start.step == 4 and start.session_log.status == event_pb2.SessionLog.START


def _events(data):
    """The events of a file: records of length, checksum, content, checksum."""
    from tensorboardX.proto import event_pb2

    out = []
    while data:
        size = int.from_bytes(data[:8], 'little')
        out.append(event_pb2.Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return out


def test_events_that_cannot_be_written_do_not_hold_up_a_run(tmp_path, monkeypatch, capsys):
    """SummaryWriter's thread ends with the first error, and its caller waits for ever."""
    from tensorboardX import event_file_writer

    def full(*_):
        raise OSError(28, 'No space left on device')

    found = writer(tmp_path)
    monkeypatch.setattr(event_file_writer.EventsWriter, 'flush', full)
    for step in range(1, 100):
        found.log(step, {'loss': 0.5})
    found.close()
    assert capsys.readouterr().err.count('TensorBoard is off') == 1
    assert steps(tmp_path) == list(range(1, 100))
