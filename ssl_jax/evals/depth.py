# SPDX-License-Identifier: Apache-2.0
"""Depth from one image by a head that is trained on the frozen encoder.

References:
  DINOv2 §7.4, Oquab et al., arXiv 2304.07193; Pixio `eval_monodepth.py`
"""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np

from ssl_jax.evals import dense_scores, head_spec, heads, task
from ssl_jax.fields import Range
from ssl_jax.run import errors

NEEDS = 'depth'


@dataclasses.dataclass(frozen=True)
class Settings:
    """Fields of `depth`; the defaults suit a small set, the official values are behind."""

    # DINOv2's linear head on the last or four blocks and its DPT head; Pixio's two.
    head: Literal['linear', 'linear4', 'dpt', 'pixio_linear', 'pixio_dpt'] = 'linear'
    # Range and region that are learned and scored, see `dense_scores.REGIONS`, and for KITTI and
    # NYU the official cuts of the images.
    dataset: Literal['scenes', 'nyu', 'kitti'] = 'scenes'
    min_depth: Annotated[float | None, Range(1e-6, 1e6)] = None  # None: that of the data set
    max_depth: Annotated[float | None, Range(1e-6, 1e6)] = None
    steps: Annotated[int, Range(1, 10**7)] = 1000  # 38400; Pixio 60 epochs (about 45000)
    batch_size: Annotated[int, Range(1, 65536)] = 16  # 16; Pixio 32
    # Height and width of training crops; None: those of the model. NYU (416, 544), KITTI
    # (352, 704); Pixio (256, 256).
    crop: tuple | None = None
    # None: 1e-3, so that few steps suffice. 1e-4; Pixio's linear head 2e-4, its DPT head 1e-4.
    lr: Annotated[float | None, Range(0.0, 10.0)] = None
    # Weight of the differences of neighbours in DINOv2's loss. Official is 0.5, of a term that is
    # 0 by a mistake with 2 images per device; here it means differences within an image.
    gradient: Annotated[float, Range(0.0, 100.0)] = 0.0
    channels: Annotated[int, Range(8, 4096)] = 256  # width of a DPT head
    seed: int = 0  # of the start and the crops


def spec_of(settings: Settings, size: int) -> head_spec.Spec:
    """The head that the settings describe, for a model of `size` pixels."""
    region = region_of(settings)
    crop = tuple(settings.crop or (size, size))
    if len(crop) != 2 or not all(isinstance(n, int) and n > 0 for n in crop):
        raise errors.UserError(f'depth.crop={crop} is no (height, width): write (416,544).')
    return head_spec.Spec(
        task='depth',
        head=settings.head,
        crop=crop,
        steps=settings.steps,
        batch_size=settings.batch_size,
        lr=1e-3 if settings.lr is None else settings.lr,
        seed=settings.seed,
        min_depth=region.min_depth,
        max_depth=region.max_depth,
        fixed=cuts(settings)[0],
        gradient=settings.gradient,
        channels=settings.channels,
        unit='' if settings.dataset == 'scenes' else 'm',
    )


def region_of(settings: Settings) -> dense_scores.Region:
    """What is scored; Pixio scores all of a cropped NYU image and all of a KITTI image."""
    region = dense_scores.REGIONS[settings.dataset]
    names = ('min_depth', 'max_depth')
    own = {n: getattr(settings, n) for n in names if getattr(settings, n) is not None}
    if settings.head.startswith('pixio'):
        own['crop'] = ''
    region = dataclasses.replace(region, **own)
    if region.min_depth >= region.max_depth:
        raise errors.UserError(
            f'depth.min_depth={region.min_depth} is not below max_depth={region.max_depth}: '
            f'correct one of them.'
        )
    return region


def cuts(settings: Settings) -> tuple[str, str]:
    """Crops before all else of (training, test) images and maps, see `pairs.cut_fixed`.

    DINOv2's heads are trained on NYU without its white frame and tested on whole images; both
    without the top and the sides of KITTI.
    """
    pixio = settings.head.startswith('pixio')
    if settings.dataset == 'nyu':
        return 'eigen', 'eigen' if pixio else ''
    fixed = 'kb' if settings.dataset == 'kitti' and not pixio else ''
    return fixed, fixed


def evaluate(model: Any, data: task.Data, settings: Settings, work: task.Work) -> Iterator[dict]:
    """Trains the head on the training images and scores it on the test images, see `task`."""
    spec, region = spec_of(settings, model.size), region_of(settings)
    train, test = data.split()
    head = heads.fit(model, train, spec, work)
    scores, shown, few = [], [], 0
    for item, pred in heads.predictions(head, test, work, cuts(settings)[1]):
        mask = dense_scores.scored(item['depth'], region)
        if len(shown) < task.SHOWN:
            shown.append((item['image'], item['depth'], pred))
        if mask.sum() < dense_scores.MIN_PIXELS:
            few += 1
            continue
        scores.append(dense_scores.depth_scores(pred[mask], item['depth'][mask]))
    if not scores:
        raise errors.UserError(
            f'No test image has {dense_scores.MIN_PIXELS} pixels with a depth from '
            f'{region.min_depth} to {region.max_depth}: set depth.min_depth and depth.max_depth.'
        )
    mean = {name: float(np.mean([s[name] for s in scores])) for name in dense_scores.DEPTH_SCORES}
    mean |= {name: 100 * mean[name] for name in ('d1', 'd2', 'd3')}
    protocol = dict(
        **spec.protocol(),
        dataset=settings.dataset,
        fixed_test=cuts(settings)[1],
        region=dataclasses.asdict(region),
        scores='mean over images; SiLog = sqrt(mean e^2 - mean(e)^2 / 2); dk in percent',
        limit=work.limit,
        **data.protocol(),
    )
    names = ('AbsRel', 'RMSE', 'log10', 'SiLog', 'd1', 'd2', 'd3')
    rmse = f'RMSE ({spec.unit})' if spec.unit else 'RMSE'
    table = {rmse if name == 'RMSE' else name: mean[name] for name in names}
    more = {name: mean[name] for name in ('SqRel', 'RMSElog')}
    about = dict(task='depth', head=settings.head, scores=table, unit=spec.unit)
    task.keep(head.folder, about, shown)
    yield task.row(
        'depth', settings.head, table, protocol, **more, images_without_depth=few,
        folder=str(head.folder),
    )  # fmt: skip
