# SPDX-License-Identifier: Apache-2.0
"""A plan as text and as a picture."""

import textwrap

GIB = 2**30
LIMITS = (
    'Memory is what the compiler allocates. Time is its static estimate, the cycles of all '
    'operations one after another: transfers between chips and between HBM and on-chip memory are '
    'taken to be hidden behind them, the input pipeline to keep up. Nothing was run.'
)


def text(plan: dict) -> str:
    """The report of a plan of `compile.plan`, a few dozen lines."""
    lines = [
        f'{plan["name"]} on {_where(plan)}',
        f'  {plan["command"]}',
        f'  {plan["parameters"] / 1e6:,.1f} M parameters, {plan["dtype"]}, remat {plan["remat"]}, '
        f'batch {plan["batch_size"]:,} = {plan["batch_size"] / plan["devices"]:g} per {_unit(plan)}'
        + (f' in {plan["accum_steps"]} micro-batches' if plan['accum_steps'] > 1 else ''),
        f'  traced in {plan["seconds_to_trace"]:.0f} s, compiled in '
        f'{plan["seconds_to_compile"]:.0f} s',
        *(f'  {line}' for warning in plan['warnings'] for line in textwrap.wrap(warning, 96)),
        '',
        *_memory(plan),
    ]
    if 'cycles' in plan:
        lines += ['', *_time(plan), '', *_communication(plan), '', *_parts(plan)]
    if 'advice' in plan:
        lines += ['', *plan['advice']]
    if 'scale' in plan:
        s = plan['scale']
        words = (
            f'scale: a bfloat16 product of two {s["side"]} x {s["side"]} matrices, compiled in the '
            f'same call, is estimated at {s["cycles"]:,} cycles, ideal are '
            f'{s["ideal_cycles"]:,.0f} (MFU {s["mfu"]:.2f}).'
        )
        lines += ['', *textwrap.wrap(words, 98)]
    lines += ['', *textwrap.wrap(LIMITS, 98)]
    return '\n'.join(lines) + '\n'


def local(plan: dict) -> str:
    """The report of a plan for the devices at hand: what XLA says of memory, no time."""
    gib = {k: f'{plan[k] / GIB:.2f} GiB' for k in ('peak', 'state_and_batch', 'program')}
    return (
        f'{plan["name"]} on {plan["devices"]}, batch {plan["batch_size"]:,}: {gib["peak"]} per '
        f'device at the peak, state and batch {gib["state_and_batch"]}, program {gib["program"]}\n'
    )


def _where(plan):
    mesh = ', '.join(f'{k} {v}' for k, v in plan['mesh'].items() if v > 1) or 'one device'
    slices = f' x {plan["slices"]} slices' if plan['slices'] > 1 else ''
    devices = f' of {plan["devices"] // plan["chips"]} devices' if _unit(plan) == 'device' else ''
    return f'{plan["topology"]}{slices}: {plan["chips"]} chips{devices}, mesh {mesh}'


def _unit(plan):
    """What holds a part of the batch: a chip, or a device where a chip has several."""
    return 'chip' if plan['devices'] == plan['chips'] else 'device'


def _memory(plan):
    hbm = plan['hbm']
    total, capacity = hbm.get('total', plan.get('needed_gib', 0) * GIB), hbm['capacity']
    rows = [(k, v) for k, v in hbm.items() if k not in ('capacity', 'total')]
    return [
        f'HBM per {_unit(plan)}, GiB',
        *(f'  {name:<28}{size / GIB:9.2f}' for name, size in rows),
        f'  {"total, of the usable":<28}{total / GIB:9.2f} of {capacity / GIB:.2f}',
        f'  fits, {(capacity - total) / GIB:.2f} GiB are free'
        if plan['fits']
        else f'  DOES NOT FIT, by {plan["over_gib"]:.2f} GiB',
    ]


def _time(plan):
    lines = [
        'estimated step',
        f'  {plan["cycles"] / 1e6:,.1f} M cycles, {plan["step_seconds"] * 1e3:,.1f} ms: '
        f'{plan["images_per_second"]:,.0f} images/s, '
        f'{plan["images_per_second_per_chip"]:,.1f} per chip',
        f'  {plan["flops"] / 1e12:,.1f} useful TFLOP: MFU {plan["mfu"]:.3f}',
        *_alone(plan),
    ]
    if plan['loops_counted_once']:
        lines.append(f'  loops of unknown length, counted once: {plan["loops_counted_once"]}')
    if plan['kernels_without_estimate']:
        lines.append(f'  kernels without an estimate: {plan["kernels_without_estimate"]}')
    return lines


def _alone(plan):
    """A line on the same step without kernels of ours, or on there being none."""
    other = plan.get('xla_alone')
    if not other:
        return [] if plan['kernels'] else ['  by XLA alone, without the kernels of ssl_jax']
    if not other['fits']:
        return [f'  without our kernels it does not fit, by {other["over_gib"]:.2f} GiB']
    return [
        f'  without our kernels, by XLA alone: {other["cycles"] / 1e6:,.1f} M cycles, '
        f'{other["images_per_second"]:,.0f} images/s, MFU {other["mfu"]:.3f}, '
        f'{other["hbm"]["total"] / GIB:.2f} GiB'
    ]


def _communication(plan):
    if not plan['collectives']:
        return [f'no communication between {_unit(plan)}s']
    lines = ['communication per step              count   MiB sent per device   mesh axes']
    for c in plan['collectives']:
        far = ', between slices' if c['between_slices'] else ''
        lines.append(
            f'  {c["kind"]:<20}{c["dtype"]:<10}{c["count"]:9,}{c["bytes"] / 2**20:22,.2f}   '
            f'{" x ".join(c["axes"]) or "none"}{far}'
        )
    share = 'its half of the links of a chip' if _unit(plan) == 'device' else 'all links of a chip'
    lines.append(
        f'  within slices {plan["link_seconds"] * 1e3:,.1f} ms at the full rate of {share}; '
        f'the step above takes it to be hidden'
    )
    if plan['slices'] > 1:
        gigabits = plan['slice_bytes'] * 8 / 1e9 / plan['step_seconds']
        lines.append(
            f'  between slices {plan["slice_bytes"] / 2**20:,.1f} MiB per {_unit(plan)}, hidden if '
            f'the network takes {gigabits:,.2f} Gbit/s from each'
        )
    return lines


def _parts(plan):
    def line(row, *more):
        return f'  {row["share"]:6.1%}  {row["part"]:<22}{row["direction"]:<12}{"".join(more)}'

    parts = [line(r) for r in plan['parts'] if r['share'] >= 0.002]
    costly = [r for r in plan['costliest'] if r['share'] >= 0.002]
    costly = [line(r, f'{r["opcode"]:<10}', r['scope']) for r in costly]
    lines = ['where the cycles go', *parts, '', 'costliest operations', *costly]
    return [text.rstrip() for text in lines]


def picture(plan: dict, path) -> None:
    """Draws where the cycles go: parts of the step, and the costliest operations."""
    import matplotlib
    from matplotlib.figure import Figure

    fig = Figure(figsize=(14, 5))
    left, right = fig.subplots(1, 2, width_ratios=(1, 1.2))
    names = list(dict.fromkeys(row['part'] for row in plan['parts']))
    colours = dict(zip(names, matplotlib.colormaps['tab10'].colors * 2, strict=False))
    shade = {'forward': 0.55, 'recomputed': 0.75, 'backward': 1.0, '': 1.0}
    starts = dict.fromkeys(names, 0.0)
    for row in plan['parts']:
        part, share = row['part'], row['share']
        bar = left.barh(
            part, share, left=starts[part], color=colours[part], alpha=shade[row['direction']],
            edgecolor='white',
        )  # fmt: skip
        starts[part] += share
        if share > 0.04:
            left.bar_label(bar, [row['direction'] or 'all'], label_type='center', fontsize=8)
    rows = plan['costliest'][:18]
    labels = [f'{r["part"]} {r["direction"]} {r["scope"]} ({r["opcode"]})' for r in rows]
    bars = [colours[r['part']] for r in rows]
    right.barh(range(len(rows)), [r['share'] for r in rows], color=bars)
    right.set_yticks(range(len(rows)), labels, fontsize=8)
    for axes in (left, right):
        axes.invert_yaxis()
        axes.set_xlabel('share of the estimated cycles')
    fig.suptitle(
        f'{plan["name"]} on {_where(plan)}\n{plan["step_seconds"] * 1e3:,.1f} ms estimated, '
        f'MFU {plan["mfu"]:.2f}', fontsize=11,
    )  # fmt: skip
    fig.tight_layout()
    fig.savefig(path, dpi=90)
