# SPDX-License-Identifier: Apache-2.0
"""`ssl_jax data curate`: the stages one after the other, the manifest, the table, the pictures."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from ssl_jax import encoder, fields, sharding
from ssl_jax.curate import copies, output, retrieve, search, steps, tree, vectors
from ssl_jax.data import manifest, sources
from ssl_jax.evals import feature_file, features
from ssl_jax.run import errors, launch, peers, storage
from ssl_jax.run import workdir as workdir_lib

GROUPS = {
    'embed': vectors.Settings,
    'search': search.Settings,
    'dedup': copies.Settings,
    'against': copies.Against,
    'retrieve': retrieve.Settings,
    'balance': tree.Settings,
}
STEPS = (steps.find_edges, steps.deduplicate, steps.keep_out, steps.retrieve_like, steps.balance)


def curate(
    pool: Any,
    out: epath.PathLike,
    *,
    queries: Sequence = (),
    against: Sequence = (),
    model: Any = None,
    embeddings: Sequence[str] = (),
    words: Sequence[str] = (),
    mesh: jax.sharding.Mesh | None = None,
) -> epath.Path:
    """Selects images of a pool: without copies, like the queries, evenly spread.

    The same call continues after a kill, and repeats only the stages whose input or settings
    changed. Several processes make one call together, with `out` on a disk that all of them read.

    Args:
      pool, queries, against: images to select from, images to find more of, images of evaluation
        sets that must not be among them: paths or specs of `sources.open_source`.
      out: a folder, or the manifest, then OUT.stages has what is kept and the pictures.
      model: `encoder.Model`, or the path of one, for the embeddings.
      embeddings: Parquet files instead, see `vectors.load`, one for each set: of the pool, then of
        the queries, then of the evaluation sets.
      words: STAGE.FIELD=VALUE, see GROUPS; data.FIELD=VALUE of all sets, see `open_source`.
      mesh: default all devices.

    Returns:
      The path of the manifest, see `data.manifest`.

    Raises:
      UserError: a set, a setting or an embedding is wrong, or nothing is left.
    """
    settings, of_data = parse(words)
    if (model is None) == (not embeddings):
        raise errors.UserError('give --model, or --embeddings with a Parquet file for each set.')
    path, folder = _places(out)
    specs = {
        name: sources.with_words(spec, of_data)
        for name, spec in {
            'pool': pool,
            **{f'query{i}': spec for i, spec in enumerate(queries)},
            **{f'against{i}': spec for i, spec in enumerate(against)},
        }.items()
    }
    with workdir_lib.lock(folder), peers.announced():
        sets = {name: _opened(name, spec) for name, spec in specs.items()}
        work = steps.Work(
            sets=sets,
            vectors=_embedded(sets, model, embeddings, settings, folder),
            settings=settings,
            mesh=mesh or sharding.make_mesh(),
            folder=folder,
        )
        state = steps.begin(work)
        for step in STEPS:
            step(work, state)
            _check_left(work, state)
        if launch.is_main():
            output.draw(work, state)
            output.write(path, work, state, specs)
        lines = output.table(work, state)
        launch.log('', *lines, '')
        launch.log(f'written to {path}: train with --data {path}; pictures: {folder}/pictures')
    return path


def _check_left(work, state):
    """Raises where the stages so far left nothing, with the pictures drawn."""
    if state.kept.any():
        return
    if launch.is_main():
        output.draw(work, state)
    gone = ', '.join(f'{stage} {gone:,}' for stage, _, gone, _ in state.table)
    raise errors.UserError(
        f'No image of the pool is left (dropped by {gone}): look at the pictures in '
        f'{work.folder}/pictures and raise the thresholds.'
    )


def parse(words: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """({stage: its settings}, {field of the sets: text}) from words STAGE.FIELD=VALUE."""
    given = {name: {} for name in (*GROUPS, 'data')}
    for word in words:
        name, equals, text = word.partition('=')
        stage, dot, field = name.partition('.')
        if not (equals and dot):
            raise errors.UserError(
                f"'{word}' is not STAGE.FIELD=VALUE, such as dedup.threshold=0.7."
            )
        if stage not in given:
            raise errors.UserError(f"'{word}': no stage {stage!r}{errors.nearest(stage, given)}")
        given[stage][field] = text
    of_data = given.pop('data')
    return {k: fields.from_words(GROUPS[k], k, found) for k, found in given.items()}, of_data


def _places(out):
    """(path of the manifest, folder of what is kept)."""
    if storage.is_remote(out):
        raise errors.UserError(
            f'{out} is in a bucket, and embeddings are mapped from a disk: give a local --out and '
            f'copy the manifest.'
        )
    out = epath.Path(out)
    if out.suffix == '.parquet':
        return out, epath.Path(f'{out}.stages')
    return out / 'manifest.parquet', out


def _opened(name, spec):
    """The source of a set; of evaluation sets every split counts."""
    source = sources.open_source(spec, 'all' if name.startswith('against') else 'train')
    launch.log(f'{name}: {manifest.where(spec)}', *sources.lines(source))
    return source


def _embedded(sets, model, embeddings, settings, folder):
    """{set: vectors.Vectors}; those of a model are computed."""
    mirrored = settings['dedup'].mirrored and settings['dedup'].threshold is not None
    if embeddings and len(embeddings) != len(sets):
        raise errors.UserError(
            f'{len(embeddings)} files of embeddings for {len(sets)} sets: give --embeddings once '
            f'for each of {", ".join(sets)}, in this order.'
        )
    if embeddings and mirrored:
        raise errors.UserError(
            'dedup.mirrored=True needs embeddings of the mirrored images: give --model.'
        )
    if not embeddings and jax.process_count() > 1:
        raise errors.UserError(
            'A model embeds images in one process: write features with `ssl_jax features`, and '
            'give several processes --embeddings.'
        )
    files, sets = dict(zip(sets, embeddings, strict=False)), dict(sets)
    if not embeddings:
        if mirrored:
            every = np.arange(len(sets['pool']))
            sets[steps.MIRRORED] = features.Edited(sets['pool'], every, lambda x, i: x[:, ::-1])
        model = model if isinstance(model, encoder.Model) else encoder.load_model(model)
        for name, source in sets.items():
            files[name] = os.fspath(folder / 'embeddings' / f'{name}.parquet')
            feature_file.extract(model, source, files[name], log=launch.log)
    place, found = folder / 'vectors', {}
    for name, source in sets.items():
        v = vectors.load(files[name], source, place, name, settings['embed'])
        found[name] = v
        if v.x.shape[1] != found['pool'].x.shape[1]:
            raise errors.UserError(
                f'The embeddings of {name} have {v.x.shape[1]} numbers and those of the pool '
                f'{found["pool"].x.shape[1]}: both must be of one model.'
            )
    return found
