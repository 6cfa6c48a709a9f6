# SPDX-License-Identifier: Apache-2.0
"""Reads of images from a bucket: etils, gcsfs, TensorStore; a rate per way and number of threads.

    PYTHONPATH=.:tests python experiments/bench/bucket.py [--delay 0.05 --kilobytes 100]

The bucket is a server on loopback (`tests/bucket.py`) that waits `--delay` seconds before each
answer. It shares the cores with the reader, so rates above about 500/s are those of the server; the
CPU time is of the reading process alone.
"""

import argparse
import concurrent.futures
import os
import pathlib
import tempfile
import time

import bucket as server
from etils import epath


def ways(root):
    """{name: function of an object's name}."""
    from ssl_jax.run import bucket, objects

    reader = objects.Reader(root)
    return {
        'etils': lambda name: epath.Path(f'{root}/{name}').read_bytes(),
        'gcsfs': lambda name: bucket.read(f'{root}/{name}'),
        'TensorStore': reader.read,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--delay', type=float, default=0.05)
    parser.add_argument('--kilobytes', type=int, default=100)
    parser.add_argument('--threads', type=int, nargs='+', default=[1, 16, 64])
    parser.add_argument('--seconds', type=float, default=4.0, help='at least, per line')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, server.serve(pathlib.Path(folder)) as served:
        os.environ.update(served.env)
        from ssl_jax.run import bucket

        root, data = f'{served.path}/images', os.urandom(args.kilobytes * 1000)
        names = [f'{i:03d}.jpg' for i in range(200)]
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda name: bucket.write(f'{root}/{name}', data), names))
        served.fault(delay=args.delay)
        for threads in args.threads:
            for way, read in ways(root).items():
                with concurrent.futures.ThreadPoolExecutor(threads) as pool:
                    list(pool.map(read, names[:threads]))  # connections
                    served.requests()
                    start, cpu, count = time.perf_counter(), time.process_time(), 0
                    while time.perf_counter() - start < args.seconds:
                        count += sum(len(x) == len(data) for x in pool.map(read, names))
                    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
                requests = sum(served.requests().values()) / count
                print(
                    f'{threads:3d} threads  {way:12s} {count / wall:6.0f} images/s  '
                    f'{cpu / count * 1e3:5.2f} ms of CPU and {requests:.1f} requests each',
                    flush=True,
                )


if __name__ == '__main__':
    main()
