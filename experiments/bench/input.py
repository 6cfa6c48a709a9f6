# SPDX-License-Identifier: Apache-2.0
"""Our stream against torchvision's transforms in a PyTorch DataLoader, in turn in one process.

    PYTHONPATH=. python experiments/bench/input.py --data FOLDER [--side 500]

Needs torch and torchvision, which the project does not. Crops are MAE's (one of 224 px) and
DINOv2's (2 x 224 and 8 x 96). PyTorch flips on the host, we on the device. `dinov2+` adds the
photometry, normalisation and float tensors that torchvision makes on the host and our device makes.
`--side 500` first encodes the images anew with a longer side of 500 px. CPU time is that of all
threads and worker processes.
"""

import argparse
import io
import os
import resource
import statistics
import tempfile
import time

import PIL.Image
import torch
import torchvision.transforms.v2 as tv
from loader import VIEWS
from torch.utils.data import DataLoader, Dataset

from ssl_jax.data import sources
from ssl_jax.data import stream as stream_lib

TICK = os.sysconf('SC_CLK_TCK')
BICUBIC = tv.InterpolationMode.BICUBIC


def crops(name, photometry):
    """The torchvision transform of each view, `count` times."""
    found = []
    for v in VIEWS[name]:
        cut = [
            tv.RandomResizedCrop(v.size, v.scale, interpolation=BICUBIC),
            tv.RandomHorizontalFlip(),
        ]
        for k in range(v.count):
            more = [tv.PILToTensor()]
            if photometry:
                first, second = v.name == 'global' and k == 0, v.name == 'global' and k == 1
                blur = tv.GaussianBlur(9, (0.1, 2.0))
                more = [
                    tv.RandomApply([tv.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
                    tv.RandomGrayscale(0.2),
                    tv.RandomApply([blur], 1.0 if first else 0.1 if second else 0.5),
                    *([tv.RandomSolarize(128, 0.2)] if second else []),
                    tv.PILToTensor(),
                    tv.ToDtype(torch.float32, scale=True),
                    tv.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
                ]
            found.append(tv.Compose([*cut, *more]))
    return found


class Images(Dataset):
    def __init__(self, paths, transforms):
        self._paths, self._transforms = paths, transforms

    def __len__(self):
        return len(self._paths)

    def __getitem__(self, i):
        with PIL.Image.open(self._paths[i]) as file:
            image = file.convert('RGB')
        return [f(image) for f in self._transforms]


def cpu_of(pid):
    with open(f'/proc/{pid}/stat') as file:
        fields = file.read().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def own_cpu():
    found = resource.getrusage(resource.RUSAGE_SELF)
    return found.ru_utime + found.ru_stime


def theirs(paths, name, photometry, args):
    """(seconds, CPU seconds) per image."""
    data = Images(paths, crops(name, photometry))
    options = dict(batch_size=args.batch, shuffle=True, drop_last=True, num_workers=args.workers)
    loader = iter(DataLoader(data, **options, prefetch_factor=2))
    next(loader)  # workers have started
    workers = [w.pid for w in loader._workers]
    start, cpu = time.perf_counter(), own_cpu() + sum(map(cpu_of, workers))
    images = 0
    for batch in loader:
        images += len(batch[0])
        used = own_cpu() + sum(cpu_of(p) for p in workers if os.path.exists(f'/proc/{p}'))
        end = time.perf_counter()
        if images >= args.images:
            break
    return (end - start) / images, (used - cpu) / images


def ours(source, name, args):
    options = dict(batch_size=args.batch, seed=0, num_threads=args.workers)
    with stream_lib.train_stream(source, VIEWS[name], **options) as stream:
        next(stream)
        start, cpu, images = time.perf_counter(), own_cpu(), 0
        while images < args.images:
            images += len(next(stream)['id'])
        return (time.perf_counter() - start) / images, (own_cpu() - cpu) / images


def smaller(source, side, folder):
    """The images with a longer side of `side` px, as JPEGs of quality 90."""
    for i in range(len(source)):
        with PIL.Image.open(io.BytesIO(source[i]['image'])) as image:
            scale = side / max(image.size)
            size = [round(x * scale) for x in image.size]
            image.convert('RGB').resize(size, PIL.Image.Resampling.LANCZOS).save(
                f'{folder}/{i:06d}.jpg', quality=90
            )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--data', required=True)
    parser.add_argument('--side', type=int)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument(
        '--workers', type=int, default=2, help='threads of ours, processes of theirs'
    )
    parser.add_argument('--batch', type=int, default=32)
    parser.add_argument('--images', type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source = sources.open_source(args.data)
        if args.side:
            smaller(source, args.side, folder)
            source = sources.open_source(folder)
        paths = [source.describe(i) for i in range(len(source))]
        for name, photometry in (('mae', False), ('dinov2', False), ('dinov2', True)):
            rows = []
            for _ in range(args.rounds):
                rows.append((*ours(source, name, args), *theirs(paths, name, photometry, args)))
            wall, cpu, their_wall, their_cpu = map(statistics.median, zip(*rows, strict=True))
            ratio = statistics.median(r[3] / r[1] for r in rows)
            at_once = statistics.median(r[2] / r[0] for r in rows)
            print(
                f'{name}{"+" * photometry:1} ours {1 / cpu:6.0f} images per CPU second, PyTorch '
                f'{1 / their_cpu:6.0f}: {ratio:.2f} times; by the clock {1 / wall:.0f} and '
                f'{1 / their_wall:.0f} images/s: {at_once:.2f} times'
            )


if __name__ == '__main__':
    main()
