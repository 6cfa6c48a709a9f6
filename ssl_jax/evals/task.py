# SPDX-License-Identifier: Apache-2.0
"""Evaluations of frozen encoders by `ssl_jax eval --tasks`: names, settings, rows, kept results.

The file <name>.py of such an evaluation has

  Settings                             a frozen dataclass, set by <name>.FIELD=VALUE, see
                                       `ssl_jax.fields`
  NEEDS                                what items of the images must have besides `image`: 'label',
                                       'segmentation' or 'depth', or '' for nothing
  evaluate(model, data, settings, work)
                                       yields rows, see `row`, of one model

with `model` an `encoder.Model` or `encoder.Pixels`, `data` a `Data` and `work` a `Work`. All
processes call it with the same arguments and yield the same rows; files are written by process 0.
A result is kept in `work.folder` under a hash of all that it depends on; what takes long keeps its
own state there and continues from it.
"""

import dataclasses
import importlib
import io
import json
import pkgutil
from collections.abc import Callable, Container, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from ssl_jax import evals, fields
from ssl_jax.data import fingerprint
from ssl_jax.evals import features
from ssl_jax.run import errors, hashing, launch, peers, storage

SHOWN = 8  # test images whose predictions are kept for pictures
SHOWN_KEYS = ('image', 'truth', 'prediction')


@dataclasses.dataclass(frozen=True)
class Data:
    """Images of an evaluation."""

    train: Any  # a source to learn from; also that of evaluations with one source
    test: Any = None  # a source to be scored on, or None

    def split(self) -> tuple[Any, Any]:
        """(train, test); without test images a fifth of the others, see `features.split`."""
        return (self.train, self.test) if self.test is not None else features.split(self.train)

    def protocol(self) -> dict:
        """What a row says of its images."""
        found = {'train': self.train, 'test': self.test}
        return {
            name: dict(images=len(source), data=fingerprint.content(source.fingerprint))
            for name, source in found.items()
            if source is not None
        }


@dataclasses.dataclass(frozen=True)
class Work:
    """How an evaluation computes, and where it keeps its state."""

    mesh: jax.sharding.Mesh
    transform: dict  # of the images, see `data.transform`; its `size` is that of the model
    folder: epath.Path  # of one model, for results and for what continues after a kill
    batch_size: int = 64
    limit: int | None = None  # images of each source at most
    log: Callable = launch.log  # for lines of progress

    def batches(self, forward: Callable, source: Any, **options) -> Iterator[dict]:
        """Outputs of `forward` for the images of a source, see `features.batches`."""
        reading = dict(transform=self.transform, batch_size=self.batch_size, mesh=self.mesh)
        return features.batches(forward, source, **{**reading, 'limit': self.limit, **options})


def row(task: str, feature: str, scores: dict[str, float], protocol: dict, **more) -> dict:
    """A row of the report.

    Args:
      task: name of the file.
      feature: what of the encoder was used, in a word.
      scores: {metric: value} in the order of the table; values in percent or with the unit in the
        name, such as 'RMSE (m)'.
      protocol: all that the numbers depend on besides the encoder, for JSON.
      more: for the JSON file alone, such as IoU per class.
    """
    protocol = dict(eval=task, feature=feature, **protocol)
    digest = hashing.text_id(json.dumps(protocol, sort_keys=True))
    scores = {name: float(value) for name, value in scores.items()}
    return dict(
        eval=task, feature=feature, scores=scores, protocol=protocol, protocol_id=digest, **more
    )


def keep(folder: epath.Path, about: dict, shown: list[tuple]) -> None:
    """Writes predictions for pictures, predictions.npz, in process 0.

    Args:
      folder: of the evaluation.
      about: for JSON: task, head, scores, and classes or unit.
      shown: (image, truth, prediction) of some test images, arrays of one size each.
    """
    arrays = {'about': np.array(json.dumps(about))}
    for i, values in enumerate(shown):
        arrays |= {f'{k}_{i}': x for k, x in zip(SHOWN_KEYS, values, strict=True)}
    if launch.is_main():
        data = io.BytesIO()
        np.savez_compressed(data, **arrays)
        storage.atomic_write(folder / 'predictions.npz', data.getvalue())


def kept(folder: epath.Path) -> dict[str, tuple[dict, list[tuple]]]:
    """{evaluation: (about, shown)}, see `keep`, of all in the folder of a model."""
    found = {}
    for name in storage.names(folder) if storage.exists(folder) else ():
        path = folder / name / 'predictions.npz'
        if storage.exists(path):
            with np.load(io.BytesIO(storage.read(path)), allow_pickle=False) as file:
                count = sum(key.startswith('image_') for key in file.files)
                shown = [tuple(file[f'{key}_{i}'] for key in SHOWN_KEYS) for i in range(count)]
                found[name] = json.loads(str(file['about'])), shown
    return found


def names() -> list[str]:
    """Evaluations of this folder."""
    files = [m.name for m in pkgutil.iter_modules(evals.__path__)]
    return sorted(name for name in files if hasattr(_module(name), 'NEEDS'))


def _module(name):
    return importlib.import_module(f'ssl_jax.evals.{name}')


def settings(name: str, words: dict[str, str]) -> Any:
    """The `Settings` of an evaluation (of kNN its `Options`) from {field: text}.

    Raises:
      UserError: a field is unknown or has a wrong value.
    """
    module = _module(name)
    cls = getattr(module, 'Settings', None) or module.Options
    return fields.from_words(cls, name, words)


def run(name: str, model: Any, data: Data, settings: Any, work: Work) -> list[dict]:
    """Rows of one evaluation of one model, or those kept from an earlier call with the same input.

    Raises:
      UserError: the images lack what the evaluation needs.
    """
    module = _module(name)
    for source in filter(None, (data.train, data.test)):
        if module.NEEDS and module.NEEDS not in source[0]:
            raise errors.UserError(
                f'the evaluation {name!r} needs images with {module.NEEDS!r}, and '
                f'{source.describe(0)} has none: see docs/maps.md for how to give them.'
            )
    values = dataclasses.asdict(settings)
    paths = [x for x in values.values() if isinstance(x, str) and x and epath.Path(x).is_file()]
    key = dict(
        task=name,
        settings=values,
        files=[hashing.digest(storage.read(path)) for path in paths],  # such as a ground truth
        data=data.protocol(),
        transform=work.transform,
        limit=work.limit,
    )
    path = work.folder / f'{name}-{hashing.text_id(json.dumps(key, sort_keys=True))}.json'
    if launch.main_number(int(storage.exists(path))):
        return json.loads(storage.read(path))
    peers.at(f'evaluating {name}')
    rows = list(module.evaluate(model, data, settings, work))
    if launch.is_main():
        storage.atomic_write(path, json.dumps(rows, indent=1) + '\n')
    return rows


def table(rows: list[dict]) -> str:
    """Rows of `row`, a block for each evaluation: the numbers, and below them their protocols."""
    blocks = []
    for name in dict.fromkeys(row['eval'] for row in rows):
        found = [row for row in rows if row['eval'] == name]
        metrics = list(dict.fromkeys(key for row in found for key in row['scores']))
        lines = [('model', 'eval', 'feature', *metrics, 'id')]
        for r in found:
            scores = [_number(r['scores'].get(key)) for key in metrics]
            lines.append((r['model'], name, r['feature'], *scores, r['protocol_id']))
        texts = aligned(lines, range(3, 3 + len(metrics)))
        protocols = {r['protocol_id']: r['protocol'] for r in found}
        texts += [f'{key}: {phrase(protocol)}' for key, protocol in protocols.items()]
        blocks.append('\n'.join(texts))
    return '\n\n'.join(blocks)


def aligned(lines: list[tuple], numbers: Container[int]) -> list[str]:
    """Rows of cells, the headers first, as lines of text with a rule below the headers.

    Args:
      lines: tuples of strings, as many in each.
      numbers: columns that are aligned to the right.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = tuple('-' * width for width in (*widths[:-1], len(lines[0][-1])))
    return [
        '  '.join(
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (lines[0], rule, *lines[1:])
    ]


def _number(value):
    """Four significant digits, or two decimals above 10."""
    if value is None:
        return ''
    return f'{value:.2f}' if abs(value) >= 10 else f'{value:.4g}'


def phrase(protocol):
    """A protocol in one line; what the table says already is left out."""
    words = []
    for key, value in protocol.items():
        if key in ('eval', 'feature'):
            continue
        if isinstance(value, dict):
            value = ' '.join(str(x) for x in value.values())
        elif isinstance(value, (list, tuple)):
            value = ' '.join(str(x) for x in value)
        words.append(f'{key.replace("_", " ")} {value}')
    return ', '.join(words)
