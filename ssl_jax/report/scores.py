# SPDX-License-Identifier: Apache-2.0
"""Evaluations in a report: the numbers of `ssl_jax eval` beside baselines, and their protocols."""

import json

from ssl_jax.evals import monitors
from ssl_jax.evals import report as report_lib
from ssl_jax.evals import task as task_lib
from ssl_jax.report import parts, plots

NAMES = {
    'knn': 'Nearest neighbours (kNN)',
    'linear': 'Linear probe',
    'logreg': 'Logistic regression',
    'few_shot': 'Few-shot kNN',
    'monitors': 'Spread of the features',
    'seg': 'Segmentation by patch features',
    'seg_head': 'Segmentation by a trained head',
    'depth': 'Depth by a trained head',
    'classifier': 'Classifier of the run',
}
HEADS = {
    'top1': 'top-1, %',
    'top5': 'top-5, %',
    'rankme': 'RankMe',
    'rankme_max': 'of at most',
    'std': 'spread',
}


def scores(runs):
    """A table for each evaluation of the newest step of each run that has one."""
    rows, notes = [], []
    for run in runs:
        if not run.evaluations:
            notes.append(f'{run.name}: ' * (len(runs) > 1) + 'there is no evaluation yet.')
            continue
        *older, newest = sorted(run.evaluations)
        rows += [(run.name, row) for row in run.evaluations[newest] if _is_row(row)]
        if newest != run.step:
            notes.append(f'{run.name} was evaluated at step {newest:,}, not at its last.')
        if older:
            notes.append(f'{run.name} was evaluated at steps {", ".join(map(str, older))} before.')
    out = ''
    kinds = dict.fromkeys(row['eval'] for _, row in rows)
    for kind in sorted(kinds, key='monitors'.__eq__):  # those last
        found = [(name, row) for name, row in rows if row['eval'] == kind]
        out += f'<h3>{parts.esc(NAMES.get(kind, kind))}</h3>{_table(found, len(runs) > 1)}'
    if rows:
        out += parts.note('Rows with the same protocol id are comparable.')
    elif runs:
        notes.append('`ssl_jax eval --workdir W --data LABELLED` makes one, with two baselines.')
    return out + ''.join(map(parts.note, notes))


def _is_row(row):
    return isinstance(row, dict) and isinstance(row.get('eval'), str) and 'protocol' in row


def _values(row):
    """{metric: number} of a row, in the order of the table."""
    if isinstance(row.get('scores'), dict):
        return row['scores']
    if row['eval'] == 'monitors':
        return {k: row.get(k) for k in monitors.NAMES}
    return {k: row[k] for k in ('top1', 'top5') if k in row}


def _table(found, with_run):
    values = [_values(row) for _, row in found]
    metrics = list(dict.fromkeys(key for v in values for key in v))
    shown = [HEADS.get(key, key) for key in metrics]
    head = (*(['run'] if with_run else []), 'model', 'feature', *shown, 'protocol')
    lines, classes, protocols, remarks = [], [], {}, []
    for (name, row), v in zip(found, values, strict=True):
        model = str(row.get('model', '')).replace('_', ' ')
        cells = [plots.number(v.get(key)) for key in metrics]
        key = str(row.get('protocol_id', ''))
        k = row['protocol'].get('k') if row['eval'] == 'knn' else None
        feature = f'{row.get("feature", "")}' + (f', k={k}' if k else '')
        lines.append((*([name] if with_run else []), model, feature, *cells, key))
        classes.append('base' if model in ('untrained', 'raw pixels') else 'own')
        protocols[key] = _protocol(row)
        if row['eval'] == 'monitors' and (sentence := monitors.suspect(v)):
            remarks.append(f'{name} {model} {feature}: {sentence}')
    numbers = range(len(head) - len(metrics) - 1, len(head) - 1)
    out = parts.table(head, lines, numbers, classes)
    out += parts.details('Protocols', parts.table((), list(protocols.items())))
    return out + ''.join(map(parts.note, remarks))


def _protocol(row):
    """All that a number depends on, in a phrase."""
    protocol = row['protocol']
    try:
        if 'scores' in row or row['eval'] == 'monitors':
            return task_lib.phrase(protocol)
        about = f', {protocol["num_classes"]} classes, by guessing {protocol["chance"]:.2f}'
        images = ''.join(
            f', {name} {protocol[name]["images"]:,} images ({protocol[name]["data"]})'
            for name in ('train', 'test')
            if name in protocol
        )
        return report_lib.brief(row) + about + images
    except (KeyError, TypeError, ValueError, AttributeError):  # of another version
        return json.dumps(protocol)
