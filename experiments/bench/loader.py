# SPDX-License-Identifier: Apache-2.0
"""The training stream: time to the first batch, images per second from the start on, memory.

    PYTHONPATH=. python experiments/bench/loader.py [--threads 16 --views dinov2 --data ...]

Views of DINOv2 (2 x 224 and 8 x 96 px) or MAE (224 px). Memory is the largest resident size of the
process above that before the first batch, in batches, while the consumer takes `--pause` seconds
per batch, as a training step would.
"""

import argparse
import resource
import threading
import time

from ssl_jax.data import host, scenes, sources
from ssl_jax.data import stream as stream_lib

VIEWS = {
    'dinov2': (
        host.View('global', 224, count=2, scale=(0.32, 1.0)),
        host.View('local', 96, count=8, scale=(0.05, 0.32)),
    ),
    'mae': (host.View('image', 224, scale=(0.2, 1.0)),),
}


def resident():
    """Bytes of this process in memory."""
    with open('/proc/self/statm') as f:
        return int(f.read().split()[1]) * resource.getpagesize()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--views', choices=VIEWS, default='dinov2')
    parser.add_argument('--data', default='scenes', help="'scenes' or a source, see docs/train.md")
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--batches', type=int, default=40)
    parser.add_argument('--threads', type=int, help='default: one per core')
    parser.add_argument('--workers', type=int, default=0)
    parser.add_argument('--pause', type=float, default=0.0)
    args = parser.parse_args()
    if args.data == 'scenes':
        source = scenes.Scenes(5000, 256)
    else:
        source = sources.open_source(args.data)
    peak, before = [0], resident()

    def watch():
        while True:
            peak[0] = max(peak[0], resident())
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()
    start, cpu = time.perf_counter(), time.process_time()
    with stream_lib.train_stream(
        source,
        VIEWS[args.views],
        batch_size=args.batch,
        seed=0,
        num_threads=args.threads,
        num_workers=args.workers,
    ) as stream:
        batch = next(stream)
        first = time.perf_counter() - start
        size = sum(x.nbytes for x in batch.values())
        for _ in range(args.batches):
            time.sleep(args.pause)
            batch = next(stream)
        images = args.batch * (args.batches + 1)
        rate, cpu = images / (time.perf_counter() - start), (time.process_time() - cpu) / images
    print(
        f'{args.views} {args.data} threads {args.threads} workers {args.workers}: first batch '
        f'{first:.2f} s, {rate:.0f} images/s, {cpu * 1e3:.1f} ms of CPU each, '
        f'{(peak[0] - before) / size:.1f} batches of {size / 2**20:.0f} MiB in memory'
    )


if __name__ == '__main__':
    main()
