# SPDX-License-Identifier: Apache-2.0
"""Parts of a report: what was trained, curves, pictures, time, use. HTML, all text escaped."""

import html
import json
import shlex

import numpy as np

from ssl_jax import config as config_lib
from ssl_jax.report import plots
from ssl_jax.run import ledger, metrics

GIB = 2**30
TITLES = {
    'loss': 'Training loss',
    'lr': 'Learning rate',
    'knn': 'kNN top-1, %',
    'seg/miou': 'Segmentation by kNN, mIoU, %',
    'features/std': 'Spread of features',
    'features/cosine': 'Mean cosine of two images',
    'features/rankme': 'RankMe of features',
    'time/images_per_second': 'Images per second',
    'time/data_wait': 'Share of time waiting for data',
    'time/mfu': 'MFU',
    'time/goodput': 'Goodput since the start',
    'grad_norm': 'Gradient norm',
}
REMARKS = {
    'features/std': '1 is even, 0 is all alike',
    'features/cosine': '1 is all alike',
    'features/rankme': 'the number of directions in use',
}
TIMES = ('time/images_per_second', 'time/data_wait', 'time/mfu', 'time/goodput')
KINDS = {'loss': 'log', 'grad_norm': 'log', 'lr': 'zero', 'time/images_per_second': 'zero'}
SHARES = {'time/data_wait', 'time/mfu', 'time/goodput'}
ABOUT = {  # of the meta of a checkpoint
    'images': 'number of images',
    'data': 'fingerprint of the images',
    'devices': 'number of devices',
    'device': 'kind of device',
}
BEHIND = ('grad_norm', 'skipped_in_a_row', 'skipped_total', 'failed')  # not among the first charts
esc = html.escape


def table(head, rows, numbers=(), classes=None):
    """A table that scrolls; cells are text, `numbers` are columns aligned to the right."""

    def line(cells, tag, name=''):
        inner = ''.join(
            f'<{tag}{" class=num" if i in numbers else ""}>{esc(str(cell))}</{tag}>'
            for i, cell in enumerate(cells)
        )
        return f'<tr{f" class={name}" if name else ""}>{inner}</tr>'

    classes = classes or [''] * len(rows)
    body = ''.join(line(row, 'td', name) for row, name in zip(rows, classes, strict=True))
    top = f'<thead>{line(head, "th")}</thead>' if head else ''
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def details(title, inner):
    """What is folded away."""
    return f'<details><summary>{esc(title)}</summary>{inner}</details>'


def note(text):
    """A sentence in a lighter colour."""
    return f'<p class="note">{esc(text)}</p>'


def state(run):
    """A word on whether a run is complete."""
    of = f' of {run.total:,}' if run.total else ''
    if 'imported' in run.meta:
        return 'imported'
    done = run.ledger.get('finished') or (run.total and run.step >= run.total)
    return f'step {run.step:,}{of}, {"finished" if done else "not finished"}'


def cards(run):
    """The numbers that are asked for first."""
    knn = [run.last(key) for key in run.series if key.startswith('knn/')]
    seconds = run.ledger.get('seconds', {})
    total = sum(seconds.values())
    done, _, word = state(run).removeprefix('step ').partition(', ')
    shown = [
        (f'steps, {word}' if word else 'state', done),
        ('loss', plots.number(run.last('loss'))),
        ('best kNN top-1', f'{max(knn):.1f} %' if knn else ''),
        ('images per second', plots.number(run.speed() and round(run.speed()))),
        ('goodput', f'{seconds.get("step", 0) / total:.0%}' if total else ''),
        ('duration', metrics.duration(total) if total else ''),
    ]
    inner = ''.join(f'<div><b>{esc(x)}</b><span>{esc(name)}</span></div>' for name, x in shown if x)
    return f'<div class="cards">{inner}</div>'


def facts(runs):
    """What was trained on what, a column for each run."""
    found = [_facts(run) for run in runs]
    labels = dict.fromkeys(label for facts in found for label in facts)
    rows = [(label, *(facts.get(label, '') for facts in found)) for label in labels]
    head = ('', *(run.name for run in runs)) if len(runs) > 1 else ()
    return f'<div class="facts">{table(head, rows)}</div>'


def _facts(run):
    """{label: text}; without what is not known."""
    f, meta = run.field, run.meta
    counts = run.parameters
    parts = ', '.join(f'{name} {count / 1e6:,.2f} M' for name, count in counts.items())
    batch, total = f('batch_size'), run.total
    images = meta.get('images')
    schedule = ''
    if batch and total:
        epochs = f', {total * batch / images:,.1f} epochs' if images else ''
        schedule = f'{total:,} steps of {batch:,} images ({total * batch:,} in all{epochs})'
    width = f('method.embed_dim')
    heads, patch, size = f('method.num_heads'), f('method.patch_size'), f('method.img_size')
    mesh = ', '.join(f'{k} {v}' for k, v in meta.get('mesh', {}).items())
    devices = ''
    if 'devices' in meta:
        kind = f' x {meta["device"]}' if 'device' in meta else ''
        devices = f'{meta["devices"]}{kind}, mesh {mesh}; processes: {meta.get("processes", 1)}'
    start = f('init_from') or f('resume_from')
    rates = run.series.get('lr')
    found = {
        'workdir': run.workdir,
        'state': state(run),
        'method': f('method.name'),
        'recipe': f('name'),
        'encoder': width
        and f'ViT of {f("method.depth")} blocks, width {width}, {heads} heads, patches of '
        f'{patch} px, crops of {size} px',
        'parameters': parts and f'{sum(counts.values()) / 1e6:,.2f} M trained: {parts}',
        'data': _spec(run.config.get('data', {}).get('train')),
        'images': images and f'{images:,}, fingerprint {meta.get("data")}',
        'schedule': schedule,
        'learning rate': rates is not None and f'up to {plots.number(float(rates[1].max()))}',
        'began from': f'weights of {start}' if start else 'fresh weights',
        'precision': f('dtype') and f'{f("dtype")}, remat {f("remat")}',
        'devices': devices,
        'versions': ', '.join(f'{k} {v}' for k, v in meta.get('versions', {}).items()),
        'seed': f('seed'),
    }
    return {k: v for k, v in found.items() if v is not None and v is not False and v != ''}


def _spec(spec):
    if not isinstance(spec, dict):
        return spec
    order = sorted(spec, key=lambda k: (k not in ('source', 'path'), k))
    values = {k: json.dumps(v) if isinstance(v, (dict, list)) else v for k, v in spec.items()}
    return ', '.join(f'{k} {values[k]}' for k in order)


def _value(x):
    """A value as it is typed in FIELD=VALUE."""
    return x if isinstance(x, str) else str(x) if x is None else json.dumps(x)


def differences(runs):
    """Fields and facts that differ, a column for each run."""
    flats = []
    for run in runs:
        flat = config_lib.flatten(run.config)
        flat.pop('overrides', None)
        flat |= {name: run.meta[k] for k, name in ABOUT.items() if k in run.meta}
        flat |= {f'version of {k}': v for k, v in run.meta.get('versions', {}).items()}
        flats.append(flat)
    rows = []
    for key in sorted({key for flat in flats for key in flat}):
        values = [_value(flat[key]) if key in flat else '–' for flat in flats]
        if len({*values}) > 1:
            rows.append((key, *values))
    if not rows:
        return note('The runs have the same fields, data, devices and versions.')
    return table(('field', *(run.name for run in runs)), rows)


def curves(runs):
    """Charts of all metrics; those asked for first are open. One run: keys of a group together."""
    one = len(runs) == 1
    panels = _grouped(runs[0].series) if one else _side_by_side(runs)
    colours = None if one else {run.name: i for i, run in enumerate(runs)}
    first, more = [], []
    for title, lines in panels.items():
        group = title.partition('/')[0]
        is_first = title in ('loss', 'lr', TIMES[0]) or (
            any('/' in key for key in [title, *lines]) and group not in (*BEHIND, 'time')
        )
        (first if is_first else more).append(_panel(title, lines, colours))
    if not first and not more:
        return note('There are no metrics yet.')
    out = f'<div class="charts">{"".join(first)}</div>'
    if more:
        out += details(f'{len(more)} more charts', f'<div class="charts">{"".join(more)}</div>')
    keys = [k for k in _order({k for run in runs for k in run.series}) if _is_shown(k)]
    rows = [(key, *(plots.number(run.last(key)) for run in runs)) for key in keys]
    head = ('metric', 'last value') if one else ('metric', *(run.name for run in runs))
    last = table(head, rows, range(1, len(head)))
    return out + (details('Last value of every metric', last) if one else last)


def _is_shown(key):
    return key in TIMES or not key.startswith(('time/', 'failed/'))


def _order(keys):
    """Loss and rate first, times last."""
    first = ['loss', 'lr']
    return sorted(keys, key=lambda k: (k not in first, k == 'lr', k.startswith('time/'), k))


def _grouped(series):
    """{title: {key: (steps, values)}} of one run."""
    panels = {}
    for key in filter(_is_shown, _order(series)):
        group = key.partition('/')[0]
        title = key if group in ('features', 'time') else group
        if not (key.startswith('skipped') and not series[key][1].any()):
            panels.setdefault(title, {})[key] = series[key]
    return {next(iter(x)) if len(x) == 1 else title: x for title, x in panels.items()}


def _side_by_side(runs):
    """{key: {name of run: (steps, values)}}."""
    panels = {}
    for key in filter(_is_shown, _order({key for run in runs for key in run.series})):
        found = {run.name: run.series[key] for run in runs if key in run.series}
        if not (key.startswith('skipped') and not any(xy[1].any() for xy in found.values())):
            panels[key] = found
    return panels


def _panel(title, found, colours=None):
    colours = colours or {label: i for i, label in enumerate(found)}
    lines = [plots.Line(label, *xy, colours[label]) for label, xy in found.items()]
    kind = KINDS.get(title, 'log' if title.endswith('loss') else '')
    if len(lines) > 1:
        below = plots.legend({
            line.colour: f'{line.label.removeprefix(title + "/")}: {plots.number(line.y[-1])}'
            for line in lines
        })  # fmt: skip
    else:
        at = f'{plots.number(lines[0].y[-1])} at step {lines[0].x[-1]:,.0f}'
        low = lines[0].y.argmin()
        if title in REMARKS:
            at += f'; {REMARKS[title]}'
        elif kind == 'log':
            at += f', lowest {plots.number(lines[0].y[low])} at {lines[0].x[low]:,.0f}'
        label = '' if lines[0].label == title else f'{lines[0].label}: '
        below = f'<p class="last">{esc(label + at)}</p>'
    heading = TITLES.get(title, title)
    return f'<figure><h3>{esc(heading)}</h3>{plots.chart(lines, kind)}{below}</figure>'


def pictures(runs):
    """Pictures over time, then the others; of several runs the newest of each kind side by side."""
    shown = []
    for run in runs:
        for picture in run.pictures:
            step = '' if picture.step is None else f', step {picture.step:,}'
            name = f'{run.name}: ' if len(runs) > 1 else ''
            caption = f'{name}{picture.name.replace("_", " ")}{step}'
            width, height = picture.size
            shown.append((
                picture.name,
                f'<figure><img src="{picture.uri}" width="{width}" height="{height}" '
                f'alt="{esc(caption)}"><figcaption>{esc(caption)}</figcaption></figure>',
            ))  # fmt: skip
    if len(runs) > 1:
        shown.sort(key=lambda pair: pair[0])
    out = f'<div class="pictures">{"".join(text for _, text in shown)}</div>'
    if not shown:
        out = note('There are no pictures: eval.tasks.pictures or `ssl_jax show` makes some.')
    left = [f'{run.workdir}/pictures/{name}' for run in runs for name in run.left_out]
    if left:
        out += note(f'Left out, as the page would be too large: {", ".join(left)}.')
    return out


def health(runs):
    """Collapse, skipped updates, failed evaluations, bad images."""
    rows = [
        (*([run.name] if len(runs) > 1 else []), '' if step is None else f'{step:,}', text)
        for run in runs
        for step, text in run.events
    ]
    if not rows:
        return note(
            'Nothing stands out: no update was skipped, no evaluation failed, no metric shows a '
            'collapse.'
            if any(run.series for run in runs)
            else 'There are no metrics to tell from.'
        )
    return table((*(['run'] if len(runs) > 1 else []), 'step', 'what'), rows)


def time(runs):
    """Goodput, seconds by phase, speed."""
    parts = []
    for run in runs:
        seconds = {k: float(x) for k, x in run.ledger.get('seconds', {}).items() if x}
        total = sum(seconds.values())
        names = {'step': 'steps', **ledger.WORDS}
        speed = [
            (TITLES[key], f'{x:.1%}' if key in SHARES else plots.number(x))
            for key in TIMES[:3]
            if key in run.series
            for x in [float(np.median(run.series[key][1]))]
        ]
        bars = rows = ''
        if total:
            order = sorted(seconds, key=lambda k: (k != 'step', -seconds[k]))
            bars = ''.join(
                f'<i class="b{i % plots.NUM_COLOURS}" '
                f'style="width:{100 * seconds[k] / total:.2f}%"></i>'
                for i, k in enumerate(order)
            )
            shown = {i: names.get(k, k) for i, k in enumerate(order)}
            bars = f'<div class="bar">{bars}</div>{plots.legend(shown)}'
            rows = table(
                ('phase', 'time', 'share'),
                [
                    (names.get(k, k), metrics.duration(seconds[k]), f'{seconds[k] / total:.1%}')
                    for k in order
                ],
                (1, 2),
            )
            good = (
                f'Goodput {seconds.get("step", 0) / total:.0%}: the share of steps that are part '
            )
            parts.append(f'<h3>{esc(run.name)}</h3>' if len(runs) > 1 else '')
            parts.append(
                note(f'{good}of the weights, in {metrics.duration(total)} over all starts.')
            )
        elif len(runs) > 1:
            parts.append(f'<h3>{esc(run.name)}</h3>')
        parts.append(bars)
        if speed:
            rows += table(('median over the run', ''), speed, (1,))
        parts.append(f'<div class="pair">{rows}</div>' if rows else note('No times are known.'))
        parts.append(_plan(run))
    return ''.join(parts)


def _plan(run):
    """The plan of `ssl_jax plan --out WORKDIR` beside what was measured."""
    plan = run.plan
    if not plan:
        return ''
    medians = {k: float(np.median(x[1])) for k, x in run.series.items() if k.startswith('time/')}
    rows = [
        ('images per second', plan.get('images_per_second'), medians.get(TIMES[0])),
        ('seconds per step', plan.get('step_seconds'), medians.get('time/seconds_per_step')),
        ('MFU', plan.get('mfu'), medians.get('time/mfu')),
        ('batch', plan.get('batch_size'), run.field('batch_size')),
        ('devices', plan.get('devices'), run.meta.get('devices')),
    ]
    if isinstance(plan.get('hbm'), dict) and 'total' in plan['hbm']:
        rows.append(('memory per device, GiB', plan['hbm']['total'] / GIB, None))
    same = all(a == b for name, a, b in rows if name in ('batch', 'devices'))
    rows = [(name, plots.number(a), plots.number(b) or '–') for name, a, b in rows if a is not None]
    out = note(f'Planned for {plan.get("topology")}: `{plan.get("command", "ssl_jax plan")}`.')
    out += table(('', 'planned', 'measured'), rows, (1, 2))
    if not same:
        out += note(
            'The plan is for another batch or number of devices: it is no forecast of this.'
        )
    return out


def use(runs):
    """How to go on with the weights."""
    parts = []
    for run in runs:
        path = shlex.quote(run.workdir)
        lines = [
            f'ssl_jax eval --workdir {path} --data LABELLED   # what the features are good for',
            f'ssl_jax export --workdir {path} --to hf --out DIR   # or official, timm, onnx, jax',
            f"model = ssl_jax.load_model({run.workdir!r})   # in Python: model(images)['cls']",
        ]
        parts.append(f'<h3>{esc(run.name)}</h3>' if len(runs) > 1 else '')
        parts.append(f'<pre>{esc(chr(10).join(lines))}</pre>')
    return ''.join(parts)


def settings(runs):
    """Every field of the config, folded away."""
    parts = []
    for run in runs:
        rows = [(k, _value(v)) for k, v in sorted(config_lib.flatten(run.config).items())]
        title = 'Every setting' + (f' of {run.name}' if len(runs) > 1 else '')
        parts.append(details(title, table((), rows)) if rows else note('config.json is absent.'))
    return ''.join(parts)
