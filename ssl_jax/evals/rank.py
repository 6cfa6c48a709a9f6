# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint, without labels: `ssl_jax rank`.

Four numbers of the features of unlabelled images, for each checkpoint of a run:

  RankMe  effective rank of the features, see `monitors.rankme`.
  LiDAR   effective rank of what differs between images and not between crops of one image.
  alpha   exponent of the power law of the spectrum of the features (alpha-ReQ); 1 is best.
  DSE     of patch tokens: distance between clusters - spread within them + effective rank.

References:
  LiDAR: Thilak et al., arXiv 2312.04000; alpha-ReQ: Agrawal et al., NeurIPS 2022;
  DSE: Dai et al., arXiv 2510.17299.
"""

import json
import math
import re
import warnings

import jax
import numpy as np
import scipy.cluster.vq
import scipy.linalg
import scipy.spatial
import scipy.stats
from etils import epath

from ssl_jax import encoder, sharding
from ssl_jax.data import fingerprint, host, sources
from ssl_jax.data import transform as transform_lib
from ssl_jax.evals import features, monitors, task
from ssl_jax.run import checkpoint, errors, hashing, launch, peers, storage, weights
from ssl_jax.viz import draw

IMAGES = 1024
VIEWS = 8  # crops of each image, for LiDAR; the paper has 50
SCALE = (0.3, 1.0)  # share of the area in a crop
DELTA = 1e-4  # added to the spread within images, as in the paper
EPS = 1e-7
FIT = (4, 100)  # ranks of the eigenvalues that alpha is fitted to, as in its authors' code
LOCAL, GLOBAL, GROUP = 3, 24, 8  # clusters of an image, and of a group of images
MAX_TOKENS = 256  # of an image, for the DSE
SLOTS = 16  # patches of each image for the effective rank
NAMES = ('RankMe', 'LiDAR', 'alpha', 'DSE')
SCORED = re.compile(r'(knn|seg\w*)/.+')  # scores on labels in metrics.jsonl


def rank(workdir, *, data=None, limit: int | None = None, log=launch.log) -> list[dict]:
    """Numbers of every checkpoint of a run, as a table, rank.json and pictures/rank.png.

    A checkpoint whose numbers are in rank.json, for the same images, is not read again.

    Args:
      workdir: of the run.
      data: images, a path or spec of `sources.open_source`; default those of the training.
      limit: number of images, default IMAGES; LiDAR and the DSE take a quarter of them.
      log: called with each line.

    Returns:
      Rows {step, RankMe, LiDAR, alpha, inter, intra, dim, DSE, and scores on labels}, by step.
    """
    workdir = epath.Path(workdir)
    steps = checkpoint.steps(workdir / 'checkpoints')
    if not steps:
        raise errors.UserError(
            f'there is no checkpoint in {workdir}: give the --workdir of a training run.'
        )
    run = weights.open_run(workdir, steps[-1])
    spec = data or (run.config.data.train if 'data' in run.config else None)
    named = isinstance(spec, (str, tuple)) or (spec and (spec.get('source') or spec.get('path')))
    if not named:
        raise errors.UserError(f'The run in {workdir} names no images: give --data.')
    source = sources.open_source(spec)
    log(*sources.lines(source))
    source = features.limited(source, limit or IMAGES)
    if len(source) < 2 * GROUP:
        raise errors.UserError(f'{len(source)} images are too few: give {2 * GROUP} or more.')
    name = run.method.monitored if run.method is not None else 'cls'
    name = name if run.vit.num_cls_tokens else 'patch'
    quarter = max(GROUP, len(source) // 4)
    about = dict(
        feature=name,
        images=len(source),
        lidar=f'{quarter} images, {VIEWS} crops of {SCALE} of the area, flipped or not; '
        f'delta {DELTA:g}',
        alpha=f'ranks {FIT} of the eigenvalues of the covariance, weights 1 / rank',
        dse=f'{quarter} images in groups of {GROUP}; k-means++ {LOCAL} and {GLOBAL}, '
        f'at most {MAX_TOKENS} patches of an image',
        **transform_lib.protocol(run.transform),
        data=fingerprint.content(source.fingerprint),
    )
    digest = hashing.text_id(json.dumps(about, sort_keys=True))
    path, kept = workdir / 'rank.json', {}
    if launch.main_number(int(storage.exists(path))):
        stored = json.loads(storage.read(path))
        if stored.get('protocol_id') == digest:
            kept = {row['step']: row for row in stored['rows'] if row['step'] in steps}
    mesh = sharding.make_mesh(data=1, fsdp=-1)
    for k, step in enumerate(steps):
        if step in kept:
            continue
        peers.at(f'measuring step {step}')
        try:
            run = weights.open_run(workdir, step)
        except checkpoint.CheckpointError as error:
            log(f'step {step} is left out: {error}')
            continue
        kept[step] = dict(step=step, **_measure(run, source, name, quarter, mesh, log))
        rows = combined(list(kept.values()))
        log(f'step {step:,} ({k + 1} of {len(steps)}): {_line(kept[step])}')
        _write(path, about, digest, rows)
    if not kept:
        raise errors.UserError(f'No checkpoint in {workdir} is intact.')
    rows = combined(list(kept.values()))
    scores = _scores(workdir, [row['step'] for row in rows])
    rows = [{**row, **scores.get(row['step'], {})} for row in rows]
    _write(path, about, digest, rows)
    if launch.is_main():
        _draw(rows, workdir / 'pictures' / 'rank.png')
        launch.show(f'\n{table(rows)}\n\n{advice(rows)}\n\nwritten to {path} and pictures/rank.png')
    return rows


def _write(path, about, digest, rows):
    if launch.is_main():
        whole = dict(protocol=about, protocol_id=digest, rows=rows)
        storage.atomic_write(path, json.dumps(whole, indent=1) + '\n')


def _measure(run, source, name, quarter, mesh, log):
    """RankMe, LiDAR, alpha and the parts of the DSE of one checkpoint."""
    vit, params = run.networks()['encoder']
    params = jax.device_put(params, sharding.infer(params, mesh))
    model = encoder.Model(vit, params, run.transform, run.path)
    features.check_size(model.size, vit.patch_size, 'size')
    options = dict(transform=run.transform, batch_size=64, mesh=mesh)

    def collect(source, forward):
        """(what `forward` returns, indices) of the images that decode."""
        found, ids = [], []
        for batch in features.told(features.batches(forward, source, **options), len(source), log):
            found.append(batch['features'][batch['mask']])
            ids.append(batch['id'][batch['mask']])
        if not sum(map(len, ids)):
            raise errors.UserError(f'None of the {len(source)} images decodes.')
        return np.concatenate(found), np.concatenate(ids)

    def whole(images):
        return model(images)[name]

    def patches(images):
        tokens = model(images)['patch_tokens']
        if tokens.shape[1] > MAX_TOKENS:
            places = np.random.default_rng(0).permutation(tokens.shape[1])[:MAX_TOKENS]
            tokens = tokens[:, np.sort(places)]
        return tokens

    def crop(image, i):
        return augmented(image, i // VIEWS, i % VIEWS, model.size)

    some = features.limited(source, quarter)
    views = features.Edited(some, np.repeat(np.arange(len(some)), VIEWS), crop)
    x, _ = collect(source, whole)
    tokens, _ = collect(some, patches)
    v, ids = collect(views, whole)
    complete = np.flatnonzero(np.bincount(ids // VIEWS) == VIEWS)
    v = v[np.isin(ids // VIEWS, complete)]
    a = alpha(x)
    return {
        'RankMe': float(monitors.rankme(x)),
        'LiDAR': lidar(v.reshape(-1, VIEWS, v.shape[1])),
        'alpha': a if math.isfinite(a) else None,  # JSON has no NaN
        **dse_parts(tokens),
    }


def augmented(image: np.ndarray, i: int, which: int, size: int) -> np.ndarray:
    """Random resized crop `which` of image `i`, flipped in half of the cases."""
    key = np.array([hashing.mix(which), i], np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key))
    out = host.random_resized_crop(image, rng, size, SCALE)
    return np.ascontiguousarray(out[:, ::-1]) if rng.random() < 0.5 else out


def lidar(x: np.ndarray) -> float:
    """Effective rank of the spread between images in units of that within images.

    Args:
      x: (n, q, d): features of q crops of n images.

    Returns:
      exp(-sum p log p) of the normalised eigenvalues p of S_w^-1/2 S_b S_w^-1/2; between 1 and
      min(n - 1, d).
    """
    x = x.astype(np.float64)
    n, q, d = x.shape
    means = x.mean(axis=1)
    between, within = means - means.mean(axis=0), (x - means[:, None]).reshape(-1, d)
    s_b = between.T @ between / max(n - 1, 1)
    s_w = within.T @ within / max(n * (q - 1), 1) + DELTA * np.eye(d)
    values = np.maximum(scipy.linalg.eigh(s_b, s_w, eigvals_only=True), 0)
    p = values / max(values.sum(), 1e-30) + EPS
    return float(np.exp(-(p * np.log(p)).sum()))


def alpha(x: np.ndarray) -> float:
    """Exponent a of the spectrum, eigenvalue k ~ k^-a, of features (n, d).

    Weighted least squares on log-log axes, weights 1 / k, over the ranks of FIT that there are;
    NaN with fewer than three.
    """
    x = x.astype(np.float64)
    n, d = x.shape
    values = np.linalg.svd(x - x.mean(axis=0), compute_uv=False) ** 2 / max(n - 1, 1)
    values = values[: min(n - 1, d)]
    k = np.arange(1, len(values) + 1)
    use = (k >= FIT[0]) & (k <= FIT[1]) & (values > 1e-10 * values[0])
    if use.sum() < 3:
        return math.nan
    return float(-np.polyfit(np.log(k[use]), np.log(values[use]), 1, w=k[use] ** -0.5)[0])


def dse_parts(tokens: np.ndarray) -> dict[str, float]:
    """inter, intra and dim of the dense structure estimator.

    With patch tokens of length 1 and r their mean distance from the mean of all,
      inter  mean distance of a token to the nearest centre of another cluster / r, with GLOBAL
             k-means clusters of each GROUP of images.
      intra  mean over these clusters, and over LOCAL clusters of each image, of the sum of singular
             values of the centred tokens / sqrt(max(n - 1, d)) / r; the mean of both.
      dim    effective rank of one token of each image / min(B, d), mean over SLOTS random places.

    Args:
      tokens: (B, N, D).
    """
    z = tokens.astype(np.float32)
    z = z / np.maximum(np.linalg.norm(z, axis=-1, keepdims=True), 1e-12)
    b, n, d = z.shape
    radius = max(np.linalg.norm(z - z.mean(axis=(0, 1)), axis=-1).mean(), 1e-6)
    inter, within = [], []
    for start in range(0, b - GROUP + 1, GROUP):
        peers.progress()
        x = z[start : start + GROUP].reshape(-1, d)
        centres, labels = _clusters(x, GLOBAL, start)
        apart = scipy.spatial.distance.cdist(x, centres)
        apart[np.arange(len(x)), labels] = np.inf
        inter.append(apart.min(axis=1).mean())
        within += _spreads(x, labels, GLOBAL)
    local = []
    for i in range(b):
        local.append(np.mean(_spreads(z[i], _clusters(z[i], LOCAL, i)[1], LOCAL) or [radius]))
    rng = np.random.default_rng(0)
    ranks = []
    for _ in range(min(SLOTS, n)):
        sigma = np.linalg.svd(z[np.arange(b), rng.integers(0, n, b)], compute_uv=False)
        p = sigma / max(sigma.sum(), 1e-30) + 1e-12
        ranks.append(np.exp(-(p * np.log(p)).sum()) / min(b, d))
    return {
        'inter': float(np.mean(inter) / radius),
        'intra': float((np.mean(within or [radius]) + np.mean(local)) / 2 / radius),
        'dim': float(np.mean(ranks)),
    }


def _clusters(x, k, seed):
    """Centres and labels of k-means with k-means++ starts; an empty cluster keeps its centre."""
    k, rng = min(k, len(x)), np.random.default_rng(seed)
    if np.ptp(x, axis=0).max() < 1e-6:  # no starts among equal tokens
        return x[:k], np.zeros(len(x), int)
    with warnings.catch_warnings(action='ignore'):  # of empty clusters
        return scipy.cluster.vq.kmeans2(x, k, 20, minit='++', seed=rng)


def _spreads(x, labels, k):
    """Sum of singular values of each cluster of two or more tokens, scaled by its size."""
    found = []
    for c in range(k):
        some = x[labels == c]
        if len(some) > 1:
            sigma = np.linalg.svd(some - some.mean(axis=0), compute_uv=False)
            found.append(sigma.sum() / math.sqrt(max(len(some) - 1, x.shape[1])))
    return found


def combined(rows: list[dict]) -> list[dict]:
    """The rows by step, with DSE = inter - intra + lambda dim.

    lambda is Std(inter - intra) / Std(dim) over the checkpoints, as in the paper, so that the DSE
    of a checkpoint depends on the others; 1 where it is not determined.
    """
    rows = sorted(rows, key=lambda row: row['step'])
    apart = np.array([row['inter'] - row['intra'] for row in rows])
    dim = np.array([row['dim'] for row in rows])
    weight = apart.std() / dim.std() if len(rows) > 2 and dim.std() > 1e-9 else 1.0
    return [
        {**row, 'DSE': float(a + weight * r)} for row, a, r in zip(rows, apart, dim, strict=True)
    ]


# The report.


def _scores(workdir, steps):
    """{step: {name: score}}: what the run measured on labels at these steps, a k per feature."""
    found = {
        key: dict(zip(map(int, x), y, strict=True))
        for key, (x, y) in draw.series(workdir / 'metrics.jsonl').items()
        if SCORED.fullmatch(key)
    }
    chosen = {}
    for key in found:
        stem, _, k = key.rpartition('/')
        far = abs(math.log(int(k) / 20)) if k.isdecimal() and int(k) else 0.0
        stem = stem if k.isdecimal() else key
        chosen[stem] = min(chosen.get(stem, (math.inf, '')), (far, key))
    keys = sorted(key for _, key in chosen.values())
    return {s: {k: float(found[k][s]) for k in keys if s in found[k]} for s in steps}


def _labelled(rows):
    """Names of scores on labels in the rows."""
    return sorted({k for row in rows for k in row if SCORED.fullmatch(k)})


def _line(row):
    names = [name for name in ('RankMe', 'LiDAR', 'alpha') if row[name] is not None]
    return ', '.join(f'{name} {row[name]:.2f}' for name in names)


def table(rows: list[dict]) -> str:
    """The rows as text; the best of each column has a star."""
    columns = [*NAMES, *_labelled(rows)]
    best = {name: _best(rows, name) for name in columns}
    lines = [('step', *columns)]
    for row in rows:
        cells = [
            f'{row[name]:.3f}{"*" if row["step"] == best[name] else " "}'
            if row.get(name) is not None
            else '- '
            for name in columns
        ]
        lines.append((f'{row["step"]}', *cells))
    return '\n'.join(task.aligned(lines, range(len(lines[0]))))


def _best(rows, name):
    """Step of the best row: the largest, or the nearest to 1 for alpha."""
    found = [(_goodness(row, name), row['step']) for row in rows if row.get(name) is not None]
    return max(found)[1] if found else None


def _goodness(row, name):
    """A number that is higher for the better checkpoint."""
    return -abs(row[name] - 1) if name == 'alpha' else row[name]


def advice(rows: list[dict]) -> str:
    """What the numbers say, and what they cannot."""
    if len(rows) < 3:
        return (
            f'{len(rows)} checkpoint{"s" * (len(rows) > 1)} cannot be ranked: keep more with '
            f'checkpoint.keep_every.'
        )
    said = ', '.join(f'{name} step {_best(rows, name)}' for name in NAMES)
    text = (
        f'Best by {said}: RankMe, LiDAR and alpha show a collapse and speak for class features, '
        f'the DSE for patch features, all only between checkpoints of one run on the same images; '
        f'a high rank is necessary and not sufficient, so where they disagree, and before you '
        f'delete anything, decide by a score on a few labels (ssl_jax eval).'
    )
    for key in _labelled(rows):
        both = [row for row in rows if key in row and row['alpha'] is not None]
        if len(both) >= 4:
            by = {
                name: scipy.stats.spearmanr(
                    [_goodness(row, name) for row in both], [row[key] for row in both]
                ).statistic
                for name in NAMES
            }
            said = ', '.join(f'{name} {value:+.2f}' for name, value in by.items())
            text += f'\nRank correlation with {key} over {len(both)} checkpoints: {said}.'
    return text


def _draw(rows, path):
    def line(name):
        pairs = [(row['step'], row[name]) for row in rows if row.get(name) is not None]
        return tuple(np.array(v) for v in zip(*pairs, strict=True))

    titles = {'alpha': 'alpha-ReQ (nearest to 1 is best)', 'DSE': 'DSE (patch tokens)'}
    panels = {
        titles.get(name, name): {name: line(name)}
        for name in NAMES
        if any(row[name] is not None for row in rows)
    }
    if labelled := _labelled(rows):
        panels['scores on labels, %'] = {name: line(name) for name in labelled}
    draw.ranking(panels, path)
