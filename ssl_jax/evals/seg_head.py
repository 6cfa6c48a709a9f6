# SPDX-License-Identifier: Apache-2.0
"""Semantic segmentation by a head that is trained on the frozen encoder.

References:
  DINOv2 §7.4, Oquab et al., arXiv 2304.07193; Pixio `eval_semseg.py`
"""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np

from ssl_jax.data import maps
from ssl_jax.evals import dense_scores, head_spec, heads, task
from ssl_jax.fields import Range

NEEDS = 'segmentation'


@dataclasses.dataclass(frozen=True)
class Settings:
    """Fields of `seg_head`; the defaults suit a small set, the official values are behind."""

    # DINOv2's linear head on the last or the last four blocks; Pixio's linear and DPT head.
    head: Literal['linear', 'linear4', 'pixio_linear', 'pixio_dpt'] = 'linear'
    steps: Annotated[int, Range(1, 10**7)] = 1000  # 40000 on ADE20K; Pixio 60 epochs
    batch_size: Annotated[int, Range(1, 65536)] = 16  # 16; Pixio 16 on ADE20K, 32 on VOC
    # Pixels of training crops and test windows; None: the size of the model. 512, linear4 640;
    # Pixio 256.
    crop: Annotated[int | None, Range(1, 8192)] = None
    lr: Annotated[float | None, Range(0.0, 10.0)] = None  # None: the official rate of the head
    ratio: tuple = (0.5, 2.0)  # range of the sizes that training images are resized to ...
    # ... in multiples of this short side, 0: their own. Test images are resized to it. None: the
    # crop, or 0 for Pixio's heads.
    base: Annotated[int | None, Range(0, 8192)] = None
    channels: Annotated[int, Range(8, 4096)] = 256  # width of a DPT head
    seed: int = 0  # of the start and the crops


def spec_of(settings: Settings, size: int, names: tuple) -> head_spec.Spec:
    """The head that the settings describe, for a model of `size` pixels and the classes `names`."""
    recipe = head_spec.RECIPES['seg_head', settings.head]
    crop = settings.crop or size
    base = (0 if recipe.pixio else crop) if settings.base is None else settings.base
    return head_spec.Spec(
        task='seg_head',
        head=settings.head,
        crop=(crop, crop),
        steps=settings.steps,
        batch_size=settings.batch_size,
        lr=recipe.lr if settings.lr is None else settings.lr,
        seed=settings.seed,
        names=tuple(names),
        ratio=tuple(settings.ratio),
        base=base or None,
        channels=settings.channels,
    )


def evaluate(model: Any, data: task.Data, settings: Settings, work: task.Work) -> Iterator[dict]:
    """Trains the head on the training images and scores it on the test images, see `task`."""
    names = maps.class_names(*filter(None, (data.train, data.test)))
    spec = spec_of(settings, model.size, names)
    train, test = data.split()
    head = heads.fit(model, train, spec, work)
    counts, shown = np.zeros((2, len(names)), np.int64), []
    for item, pred in heads.predictions(head, test, work):
        counts += dense_scores.intersection_union(pred, item['segmentation'], len(names))
        if len(shown) < task.SHOWN:
            shown.append((item['image'], item['segmentation'], pred))
    per_class = dense_scores.iou(*counts)
    absent = 'zero' if spec.recipe.pixio else 'left out'
    protocol = dict(
        **spec.protocol(),
        classes=len(names),
        absent_classes=absent,
        limit=work.limit,
        **data.protocol(),
    )
    scores = {'mIoU': dense_scores.mean_iou(per_class, absent)}
    about = dict(task='seg_head', head=settings.head, scores=scores, classes=names)
    task.keep(head.folder, about, shown)
    yield task.row(
        'seg_head',
        settings.head,
        scores,
        protocol,
        iou={
            name: None if np.isnan(x) else float(x)
            for name, x in zip(names, per_class, strict=True)
        },
        folder=str(head.folder),
    )
