# SPDX-License-Identifier: Apache-2.0
"""kNN top-1 (k = 20) of the runs of run.sh, two seeds: python experiments/curation/table.py OUT."""

import json
import pathlib
import sys

ARMS, SEEDS = ('curated', 'raw', 'random'), (0, 1)


def scores(folder):
    """{(model, feature): top-1 in percent} of a run."""
    (path,) = folder.glob('eval_*.json')
    rows = [row for row in json.loads(path.read_text()) if row['eval'] == 'knn']
    return {(row['model'], row['feature']): row['top1'] for row in rows if row.get('k') == 20}


def main(out):
    found = {(a, s): scores(pathlib.Path(out) / f'{a}_{s}') for a in ARMS for s in SEEDS}
    lines = [('encoder', 'feature', *ARMS)]
    for model, feature in found[ARMS[0], SEEDS[0]]:
        cells = (
            ' / '.join(f'{found[arm, seed][model, feature]:.1f}' for seed in SEEDS) for arm in ARMS
        )
        lines.append((model, feature, *cells))
    lines.insert(1, ('---',) * len(lines[0]))
    print('\n'.join(f'| {" | ".join(line)} |' for line in lines))


if __name__ == '__main__':
    main(sys.argv[1])
