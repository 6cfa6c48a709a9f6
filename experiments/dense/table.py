# SPDX-License-Identifier: Apache-2.0
"""The tables of README.md from the runs of evaluate.sh: python experiments/dense/table.py RUNS."""

import json
import pathlib
import sys

MODELS = ('trained', 'untrained', 'raw_pixels')
CAMVID = {  # (evaluation, feature): metric
    ('seg', 'kNN'): 'mIoU',
    ('seg', 'logistic regression'): 'mIoU',
    ('pck', 'last'): 'PCK@0.1 (%)',
    ('video', 'last'): 'J&F (%)',
}
SCENES = {
    ('linear', None): 'top1',
    ('seg', 'kNN'): 'mIoU',
    ('seg', 'logistic regression'): 'mIoU',
    ('depth', 'linear'): 'RMSE',
    ('depth', ' linear'): 'd1',
}


def scores(path, wanted):
    """{model: [score or None]} of a report."""
    rows = json.loads(path.read_text())
    found = {}
    for model in MODELS:
        own = [row for row in rows if row['model'] == model]
        found[model] = [
            next(
                (
                    row.get('scores', row)[metric]
                    for row in own
                    if row['eval'] == kind
                    and feature in (None, row['feature'], f' {row["feature"]}')
                ),
                None,
            )
            for (kind, feature), metric in wanted.items()
        ]
    return found


def table(runs, names, file, wanted):
    heads = [
        f'{kind} {(feature or "").strip()} {metric}' for (kind, feature), metric in wanted.items()
    ]
    print('| encoder | ' + ' | '.join(heads) + ' |\n' + '|---' * (len(heads) + 1) + '|')
    for name in names:
        found = scores(runs / name / file, wanted)
        for model in MODELS:
            cells = ('' if x is None else f'{x:.2f}' for x in found[model])
            print(f'| {name}, {model.replace("_", " ")} | {" | ".join(cells)} |')
    print()


def main(runs):
    runs = pathlib.Path(runs)
    table(runs, ('camvid_mae', 'mae_0'), 'camvid.json', CAMVID)
    names = [f'{name}_{seed}' for name in ('mae', 'pixio', 'dinov2') for seed in (0, 1)]
    table(runs, names, 'scenes.json', SCENES)


if __name__ == '__main__':
    main(sys.argv[1])
