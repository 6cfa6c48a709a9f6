# SPDX-License-Identifier: Apache-2.0
"""What the workdir of a run says of it; parts that are absent or broken are named, not errors."""

import base64
import dataclasses
import io
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
import PIL.Image
from etils import epath

from ssl_jax import config as config_lib
from ssl_jax import methods
from ssl_jax.evals import monitors
from ssl_jax.run import checkpoint, errors, metrics, storage
from ssl_jax.run import clock as clock_lib
from ssl_jax.viz import draw

EVALUATION = re.compile(r'eval_(\d+)\.json')
STEP = re.compile(r'_(\d{4,})$')  # at the end of the name of a picture of a series
MANY = 24  # pictures of a run at most
OVER_TIME = 5  # pictures of a series that are shown
PICTURE_BYTES = 3_300_000  # of all pictures of a page; base64 makes a third more of them
LARGE = 300_000  # bytes of a picture from which on it becomes a JPEG
WIDTH, QUALITY = 1200, 85  # pixels at most, of these JPEGs
TENSOR = re.compile(r'model/params/([^/]+)/.*')
SENTENCES = 12  # on events, at most


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture for a page."""

    name: str  # of the file, without its step
    step: int | None  # of a series
    uri: str  # data:image/...
    size: tuple[int, int]  # pixels, width and height


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, read from its workdir; what is not there is empty."""

    workdir: str
    name: str  # differs from those of other runs on the page
    config: dict
    meta: dict  # of the newest checkpoint
    series: dict[str, np.ndarray]  # {metric: (steps, values)}, finite numbers
    events: list[tuple[int | None, str]]  # (step, sentence) of what went wrong
    evaluations: dict[int, list[dict]]  # by step
    pictures: list[Picture]
    left_out: list[str]  # names of pictures for which there is no room
    ledger: dict
    plan: dict
    missing: list[str]  # sentences

    def field(self, name: str, default: Any = None) -> Any:
        """A field of the config, such as 'method.depth'."""
        return config_lib.flatten(self.config).get(name, default)

    @property
    def step(self) -> int:
        """Steps done, as far as any file says."""
        seen = [x[0][-1] for x in self.series.values()]
        return int(max([*seen, self.meta.get('step', 0), self.ledger.get('step', 0)]))

    @property
    def total(self) -> int | None:
        """Steps of the whole run."""
        clock = _clock(self.config, self.meta)
        return clock and clock.total

    @property
    def parameters(self) -> dict[str, int]:
        """{network: trained parameters}."""
        counts = {}
        for key, tensor in self.meta.get('tensors', {}).items():
            if found := TENSOR.fullmatch(key):
                shape = re.findall(r'\d+', tensor['type'].partition('[')[2])
                counts[found[1]] = counts.get(found[1], 0) + math.prod(map(int, shape))
        return counts

    def last(self, key: str) -> float | None:
        """The newest value of a metric."""
        return float(self.series[key][1, -1]) if key in self.series else None

    def speed(self) -> float | None:
        """Images per second, the median over the run."""
        values = self.series.get('time/images_per_second')
        return None if values is None else float(np.median(values[1]))


def read_all(workdirs: Sequence[epath.PathLike]) -> list[Run]:
    """The runs of workdirs, with names that differ; they share the room for pictures.

    Raises:
      UserError: a workdir holds no run, or is given twice.
    """
    paths = [str(path).rstrip('/') or '/' for path in workdirs]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise errors.UserError(f'{twice[0]} is given twice: give each --workdir once.')
    names = [path.rpartition('/')[2] or path for path in paths]
    budget, many, found = PICTURE_BYTES // len(paths), 1 if paths[1:] else OVER_TIME, []
    for path, name in zip(paths, names, strict=True):
        found.append(read(path, name if names.count(name) == 1 else path, budget, many))
    return found


def read(workdir: str, name: str, budget: int = PICTURE_BYTES, many: int = OVER_TIME) -> Run:
    """A run.

    Args:
      workdir: of the run.
      name: for the page.
      budget: bytes of all its pictures.
      many: pictures of a series at most, the newest among them.

    Raises:
      UserError: the workdir holds no run.
    """
    storage.require(workdir)
    names, missing = storage.names(workdir), []
    if not {'config.json', 'metrics.jsonl', 'metrics', 'checkpoints'} & {*names}:
        raise errors.UserError(
            f'{workdir} holds no run (no config.json, metrics.jsonl or checkpoints): give the '
            f'--workdir of `ssl_jax pretrain` or `finetune`.'
        )
    meta = checkpoint.newest_meta(epath.Path(workdir) / 'checkpoints') or {}
    if not meta:
        missing.append('There is no checkpoint: data, devices and versions are not known.')
    stored = _json(workdir, names, 'config.json', dict, missing)
    config = stored or meta.get('config', {})
    if 'imported' in meta:
        missing.append('These weights were imported, not trained here.')
    rows = metrics.read(f'{workdir}/metrics.jsonl')
    lines = storage.read_lines(f'{workdir}/metrics.jsonl')
    if not rows:
        missing.append('There are no metrics (metrics.jsonl): no curves.')
    elif (broken := sum(map(bool, lines)) - len(rows)) > 0:
        missing.append(f'{broken} lines of metrics.jsonl cannot be read and are left out.')
    ledger = _json(workdir, names, 'ledger.json', dict, missing)
    if not ledger:
        missing.append('There is no ledger.json: where the time went is not known.')
    steps = sorted(int(found[1]) for found in map(EVALUATION.fullmatch, names) if found)
    evaluations = {s: _json(workdir, names, f'eval_{s}.json', list, missing) for s in steps}
    pictures, left_out = _pictures(workdir, budget, many, missing)
    return Run(
        workdir=workdir,
        name=name,
        config=config,
        meta=meta,
        series=draw.series_of(rows),
        events=_events(workdir, names, config, meta, rows),
        evaluations={s: found for s, found in evaluations.items() if found},
        pictures=pictures,
        left_out=left_out,
        ledger=ledger,
        plan=_json(workdir, names, 'plan.json', dict, missing),
        missing=missing,
    )


def _json(workdir, names, name, kind, missing):
    """The content of a file that is there, else an empty `kind`; says if it cannot be read."""
    if name not in names:
        return kind()
    try:
        found = json.loads(storage.read(f'{workdir}/{name}'))
        if isinstance(found, kind):
            return found
        problem = f'it holds no {kind.__name__}'
    except ValueError as error:
        problem = str(error)
    missing.append(f'{name} cannot be read ({problem}).')
    return kind()


def _pictures(workdir, budget, many, missing):
    """([Picture], [names of those left out]); the newest come first, series before others."""
    names = [name for name in storage.names(f'{workdir}/pictures') if name.endswith('.png')]
    kinds = {}
    for name in names:
        stem = name.removesuffix('.png')
        found = STEP.search(stem)
        if stem != 'curves':  # which the page draws itself
            kinds.setdefault(STEP.sub('', stem), []).append((int(found[1]) if found else -1, name))
    chosen = []
    for kind, files in kinds.items():
        files = sorted(files)
        index = {round(i) for i in np.linspace(len(files) - 1, 0, min(many, len(files)))}
        chosen += [(len(files) - 1 - i, files[i][0] < 0, kind, *files[i]) for i in index]
    pictures, left_out = [], []
    for *_, kind, step, name in sorted(chosen):
        if len(left_out) > 2 or len(pictures) == MANY:
            left_out.append(name)
            continue
        try:
            data, form, size = _small(storage.read(f'{workdir}/pictures/{name}'))
        except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
            missing.append(f'pictures/{name} cannot be read ({error}).')
            continue
        if len(data) > budget:
            left_out.append(name)
            continue
        budget -= len(data)
        uri = f'data:image/{form};base64,{base64.b64encode(data).decode()}'
        pictures.append(Picture(kind, None if step < 0 else step, uri, size))
    return sorted(pictures, key=lambda p: (p.step is None, p.name, p.step or 0)), left_out


def _small(data):
    """(bytes, 'png' or 'jpeg', (width, height)) of a PNG, a JPEG of it if it is large."""
    with PIL.Image.open(io.BytesIO(data), formats=['PNG']) as image:
        if len(data) <= LARGE:
            image.load()
            return data, 'png', image.size
        image = image.convert('RGB')
        image.thumbnail((WIDTH, 4 * WIDTH), reducing_gap=2.0)
        file = io.BytesIO()
        image.save(file, 'JPEG', quality=QUALITY)
        return file.getvalue(), 'jpeg', image.size


def _events(workdir, names, config, meta, rows):
    """[(step or None, sentence)] of what went wrong; of a streak only its start."""
    events, values, active, skipped = [], {}, set(), 0
    suspect, suspect_features = _suspect(config, meta), _suspect_features(config)
    for row in rows:
        step = int(row['step'])
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != 'step'}
        values |= numbers
        found = {k: None if math.isfinite(x) else f'{k} is {x}.' for k, x in numbers.items()}
        if 'loss' in numbers:
            found['collapse'] = suspect(values, step)
        if 'features/std' in numbers:
            found['collapse of features'] = suspect_features(numbers)
        for key in numbers:
            if key.startswith('failed/'):
                found[f'{key} failed'] = (
                    f'The evaluation {key.partition("/")[2]} failed, see the log.'
                )
        events += [(step, text) for key, text in found.items() if text and key not in active]
        active = (active - {*found}) | {key for key, text in found.items() if text}
        count = numbers.get('skipped_total', skipped)
        if count > skipped:
            events.append((step, f'{count - skipped:,.0f} updates were skipped as not finite.'))
        skipped = count
    for name in names:
        if re.fullmatch(r'bad_images(\.\d+)?\.jsonl', name):
            count = len(storage.read_lines(f'{workdir}/{name}'))
            events.append((None, f'{count:,} images could not be decoded, see {name}.'))
    more = len(events) - SENTENCES
    return events[:SENTENCES] + ([(None, f'And {more} more like these.')] if more > 0 else [])


def _clock(config, meta):
    """The clock of a stored config, None where it has none."""
    try:
        return clock_lib.Clock.of(ml_collections.ConfigDict(config), meta.get('images'))
    except (errors.UserError, AttributeError, TypeError, ValueError):
        return None


def _suspect(config, meta):
    """What the method says of its latest metrics; nothing where this version cannot make it."""
    clock = _clock(config, meta)
    try:
        method = clock and methods.make(config_lib.from_dict(config)[0], clock)
    except (errors.UserError, ValueError, KeyError, TypeError, AttributeError):
        method = None

    def suspect(values, step):
        try:
            return method and method.suspect(values, step)
        except (KeyError, TypeError, ValueError, AttributeError):  # metrics of another version
            return None

    return suspect


def _suspect_features(config):
    """What `evals.monitors` says of the features of an evaluation."""
    flat = config_lib.flatten(config)
    num = flat.get('eval.tasks.monitors.num_images', monitors.Options.num_images)
    most = min(num or 1, flat.get('method.embed_dim') or 1)

    def suspect(numbers):
        v = {k: numbers[f'features/{k}'] for k in monitors.NAMES if f'features/{k}' in numbers}
        return monitors.suspect({**v, 'rankme_max': most}) if len(v) == 3 else None

    return suspect
