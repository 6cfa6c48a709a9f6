# SPDX-License-Identifier: Apache-2.0
"""Images from a bucket by etils, gcsfs and TensorStore: rates of reading alone, and of the loader.

    PYTHONPATH=.:tests python experiments/bench/bucket_read.py [--delay 0.05 --threads 16 64]

The bucket is a server on loopback (`tests/bucket.py`) that waits `--delay` seconds before each
answer. It shares the cores with the reader, so compare ways, not rates; CPU time is that of the
reading process alone.
"""

import argparse
import concurrent.futures
import io
import os
import pathlib
import tempfile
import time

import numpy as np
import PIL.Image
from etils import epath

import bucket as server

COUNT = 200  # images


class Images:
    """A source that reads its images with a function of their names."""

    classes = None

    def __init__(self, names, read):
        self._names, self._read = names, read

    def __len__(self):
        return len(self._names)

    def __getitem__(self, i):
        return {'image': self._read(self._names[i])}


def jpeg():
    """A JPEG of 256 x 256 pixels and 20 kB."""
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    out = io.BytesIO()
    PIL.Image.fromarray(pixels).resize((256, 256)).save(out, 'JPEG', quality=95)
    return out.getvalue()


def reading(names, read, threads):
    """Iterates over numbers of images read."""
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        while True:
            yield len([*pool.map(read, names)])


def loader(names, read, threads):
    """Iterates over numbers of images cut for MAE."""
    from ssl_jax.data import host, stream

    views = [host.View('image', 224)]
    with stream.train_stream(
        Images(names, read), views, batch_size=64, seed=0, num_threads=threads
    ) as batches:
        for batch in batches:
            yield len(batch['id'])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--delay', type=float, default=0.05)
    parser.add_argument('--threads', type=int, nargs='+', default=[16, 64])
    parser.add_argument('--seconds', type=float, default=4.0, help='of each line, at least')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, server.serve(pathlib.Path(folder)) as served:
        os.environ.update(served.env)
        from ssl_jax.run import bucket, bulk

        root, data = f'{served.path}/images', jpeg()
        names = [f'{root}/{i:03d}.jpg' for i in range(COUNT)]
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda name: bucket.write(name, data), names))
        served.fault(delay=args.delay)
        ways = {
            'etils': lambda name: epath.Path(name).read_bytes(),
            'gcsfs': bucket.read,
            'TensorStore': bulk.read,
        }
        for work in (reading, loader):
            for threads in args.threads:
                for way, read in ways.items():
                    counts = work(names, read, threads)
                    next(counts)  # connections
                    served.requests()
                    start, cpu, count = time.perf_counter(), time.process_time(), 0
                    while time.perf_counter() - start < args.seconds:
                        count += next(counts)
                    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
                    requests = sum(served.requests().values())
                    counts.close()
                    print(
                        f'{work.__name__:7s}  {threads:2d} threads  {way:11s} {count / wall:4.0f} '
                        f'images/s  {cpu / count * 1e3:4.2f} ms of CPU and {requests / count:.1f} '
                        'requests each',
                        flush=True,
                    )


if __name__ == '__main__':
    main()
