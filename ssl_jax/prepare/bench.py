# SPDX-License-Identifier: Apache-2.0
"""`ssl_jax data bench`: images per second by stage, and what to change."""

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ssl_jax import config as config_lib
from ssl_jax.check import data as check_data
from ssl_jax.data import host, maps, order
from ssl_jax.data import stream as stream_lib
from ssl_jax.evals import task
from ssl_jax.prepare import encoded
from ssl_jax.run import errors, launch, patience

SECONDS = 4.0  # of the stages, and again of the stream
LATE = 2.0  # a stage of which waiting takes more than this many times its work waits for a disk


@dataclasses.dataclass
class Stage:
    """Seconds of a stage, all images together."""

    name: str
    wall: float = 0.0
    cpu: float = 0.0


def bench(
    recipe: str,
    fields: Sequence[str],
    seconds: float = SECONDS,
    log: Callable[[str], None] = launch.log,
) -> None:
    """Prints a table of the stages, the rate of the stream, and what would help most.

    Args:
      recipe: as `config.load` takes it.
      fields: overrides 'a.b=value', with `data.train`.
      seconds: for the stages in one thread, and again for the stream in all.
      log: called with each line.
    """
    config = config_lib.load(recipe, fields)
    trial = check_data.Trial(config)
    views = trial.method.views()
    cut = ', '.join(f'{v.count} x {v.size} px' for v in views)
    log(f'{len(trial.source):,} images; crops of {trial.config.method.name}: {cut}')
    stages, count, about = measure(trial.source, views, trial.config.seed, seconds)
    total = sum(stage.cpu for stage in stages)
    lines = [('stage, in one thread', 'ms wall', 'ms CPU', 'of the CPU', 'images/s per core')]
    for stage in (*stages, Stage('all', sum(s.wall for s in stages), total)):
        share = f'{100 * stage.cpu / total:.0f} %'
        times = (f'{1000 * x / count:.3g}' for x in (stage.wall, stage.cpu))
        lines.append((stage.name, *times, share, _rate(count / max(stage.cpu, 1e-9))))
    for line in task.aligned(lines, range(1, 5)):
        log(line)
    began = time.process_time()
    rate, bad, seen = check_data.loading(trial, seconds)
    used = (time.process_time() - began) / seen
    threads = trial.config.data.num_threads or stream_lib.num_reading(trial.source, 64)
    log(
        f'stream    {_rate(rate)} images/s with {threads} threads on {launch.cores()} cores; '
        f'{_rate(1 / used)} per second of CPU'
    )
    if bad:
        log(f'          {bad} of {seen} images cannot be decoded: see ssl_jax data check')
    for line in advice(stages, views, about, trial.config.data.train):
        log(line)


def measure(
    source: Any, views: Sequence[host.View], seed: int, seconds: float
) -> tuple[list[Stage], int, dict]:
    """What `stream.train_stream` does with each image, step by step in this thread.

    Returns:
      (stages, number of images, {'kinds': formats of the files, 'side': median of the long side}).

    Raises:
      UserError: none of the images can be decoded.
    """
    source, n, index_of = maps.images_only(source), len(source), order.of(source)
    names = [f'crop and resize {v.count} x {v.size} px' for v in views]
    stages = [Stage(name) for name in ('read', 'decode', *names, 'copy into the batch')]
    batch = {v.name: np.zeros((8, v.count, v.size, v.size, 3), np.uint8) for v in views}
    min_size = stream_lib.min_size(views)
    count, kinds, sides, g, end = 0, {}, [], 0, time.perf_counter() + seconds
    while (time.perf_counter() < end or count < 8) and (count or g <= n):
        marks = [_now()]
        try:
            data = stream_lib.read(source, index_of(g, seed))['image']
            marks.append(_now())
            image = host.decode(data, min_size)
            marks.append(_now())
        except patience.Unavailable:
            raise
        except (errors.UserError, OSError):
            g += 1
            continue
        rng, crops = stream_lib.generator(seed, g), {}
        for v in views:
            cut = [host.random_resized_crop(image, rng, v.size, v.scale) for _ in range(v.count)]
            crops[v.name] = np.stack(cut)
            marks.append(_now())
        for name, value in crops.items():
            batch[name][g % 8] = value
        marks.append(_now())
        if g:  # the first one starts what the libraries start once
            for stage, (a, b) in zip(stages, itertools.pairwise(marks), strict=True):
                stage.wall += b[0] - a[0]
                stage.cpu += b[1] - a[1]
            count += 1
        if len(sides) < 256:
            kind, side = _kind(data)
            kinds[kind] = kinds.get(kind, 0) + 1
            sides.append(side)
        g += 1
    if not count:
        raise errors.UserError(f'None of the {g} images can be decoded: see ssl_jax data check.')
    return stages, count, {'kinds': kinds, 'side': float(np.median(sides))}


def advice(
    stages: Sequence[Stage], views: Sequence[host.View], about: dict, train: Any
) -> list[str]:
    """Which stage is the largest, and what to change.

    Args:
      stages: of `measure`, read and decode first, the copy last.
      views: of the method.
      about: of `measure`.
      train: `data.train` of the config: a path or a spec.
    """
    wall, cpu = sum(s.wall for s in stages), sum(s.cpu for s in stages)
    read, decode, *crops, copy = stages
    path = train if isinstance(train, (str, os.PathLike)) else train.get('path') or 'SRC'
    pack = f'ssl_jax data pack {path}'
    if read.wall > LATE * read.cpu and read.wall > 0.3 * wall:
        return [
            f'largest: read, {100 * read.wall / wall:.0f} % of the time, most of it waiting: few '
            f'large files on a near disk ({pack} --to arrayrecord --out DIR), or more threads '
            f'(data.num_threads={4 * launch.cores()})'
        ]
    cutting = Stage('crop and resize', sum(s.wall for s in crops), sum(s.cpu for s in crops))
    largest = max((read, decode, cutting, copy), key=lambda s: s.cpu)
    out = f'largest: {largest.name}, {100 * largest.cpu / cpu:.0f} % of the CPU time: '
    cores = f'or more than these {launch.cores()} cores'
    need = _side(views)
    kind = max(about['kinds'], key=about['kinds'].get)
    if largest is read:
        return [out + f'few large files are opened less often: {pack} --to arrayrecord --out DIR']
    if largest is copy:
        return [out + f'memory is the limit: fewer or smaller crops, {cores}']
    if largest is cutting:
        large = f'smaller images shrink faster ({pack} --to tar --out DIR --max-side {need}), '
        large = large if about['side'] > 1.5 * need else ''
        return [out + f'{large}fewer or smaller crops, {cores}']
    if about['side'] > 1.2 * need:
        return [
            f'{out}the images have {about["side"]:.0f} px and these crops need about {need}: '
            f'smaller JPEGs ({pack} --to tar --out DIR --max-side {need}), {cores}'
        ]
    if kind != 'JPEG':
        return [f'{out}{kind} takes longer than JPEG: store them as JPEG, {cores}']
    return [f'{out}they are small JPEGs already, only more than {launch.cores()} cores help']


def _side(views):
    """Pixels of the long side at which packed images lose no detail of the crops: a multiple of 32.

    A third more than the short side that the stream decodes to, as photographs are 4 : 3.
    """
    return -(-stream_lib.min_size(views) * 4 // 3 // 32) * 32


def _kind(data):
    if not isinstance(data, bytes):
        return 'arrays', max(data.shape[:2])
    found = encoded.header(data)
    return found.format, max(found.width, found.height)


def _now():
    return time.perf_counter(), time.thread_time()


def _rate(x):
    return f'{x:,.0f}' if x >= 10 else f'{x:.2g}'
