# SPDX-License-Identifier: Apache-2.0
"""Steps of this project and of a PyTorch twin in turn, and the ratio of their times.

Each side has a separate process, because two thread pools in one process disturb each other. They
take turns, so that both have the same neighbours on a shared machine; the ratio is the median over
pairs of turns. A turn is two steps, of which the second is timed: training has no pauses, and the
first step of a turn pays for one (0.7 s with XLA, 0.3 s with PyTorch on the machine of the recorded
numbers), perhaps because a virtual machine returns freed memory to its host meanwhile. Busy cores
make the ratio meaningless, in favour of JAX: PyTorch's threads then wait for each other far longer.

GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in front of the command, as in the recorded numbers, gives
both sides pages of 2 MiB; the report says what was set.
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import time


def main(doc, sides, batch):
    """Runs the comparison with flags from the command line.

    Args:
      doc: docstring of the script.
      sides: {'jax': f, 'torch': f}, each (args) -> (function of no arguments that does a step,
        versions); called in a separate process, so functions of a module.
      batch: default images per step.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument('--pairs', type=int, default=15, help='timed pairs of turns, at least 2')
    parser.add_argument('--threads', type=int, default=2, help='cores, the same for both sides')
    parser.add_argument('--batch', type=int, default=batch, help='images per step')
    parser.add_argument('--only', choices=tuple(sides), help='time one side alone')
    args = parser.parse_args()
    # XLA sizes its thread pool by the cores that the process may use when it starts.
    if hasattr(os, 'sched_setaffinity'):
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < args.threads:
            raise ValueError(f'--threads {args.threads} is more than the {len(cores)} cores here.')
        os.sched_setaffinity(0, cores[-args.threads :])
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')

    context = multiprocessing.get_context('spawn')
    pipes, versions, processes = {}, [], []
    for name in [args.only] if args.only else sides:
        pipes[name], far_end = context.Pipe()
        words = (sides[name], args, far_end)
        processes.append(context.Process(target=serve, args=words, daemon=True))
        processes[-1].start()
        far_end.close()  # so that a side that fails ends the wait with EOFError
        versions.append(pipes[name].recv())
    times = {name: [] for name in pipes}
    for i in range(args.pairs):
        for name in sorted(pipes, reverse=i % 2 == 1):  # alternate who goes first
            pipes[name].send(True)
            times[name].append(pipes[name].recv())
    for pipe in pipes.values():
        pipe.send(False)
    for process in processes:
        process.join()
    report(args, versions, times)


def serve(side, args, pipe):
    """Process of one side: sends its versions, then takes a turn per request."""
    step, versions = side(args)
    step(), step()  # compilation and first touches
    pipe.send(versions)
    while pipe.recv():
        step()
        start, cpu = time.perf_counter(), time.process_time()
        step()
        pipe.send((time.perf_counter() - start, time.process_time() - cpu))


def report(args, versions, times):
    malloc = os.environ.get('GLIBC_TUNABLES') or 'default malloc'
    print(
        f'{args.threads} threads, {malloc}, python {platform.python_version()}, '
        f'{", ".join(versions)}'
    )
    for name, pairs in times.items():
        wall, cpu = zip(*pairs, strict=True)
        middle, used = statistics.median(wall), statistics.median(cpu)
        print(
            f'{name:>6}: median {1e3 * middle:6.0f} ms, min {1e3 * min(wall):6.0f} ms, '
            f'{args.batch / middle:5.1f} images/s, CPU time {1e3 * used:6.0f} ms'
        )
    if len(times) == 2:
        for k, what in enumerate(('wall', 'CPU time')):
            jax, torch = ([t[k] for t in times[name]] for name in ('jax', 'torch'))
            low, mid, high = statistics.quantiles(
                [j / t for j, t in zip(jax, torch, strict=True)], n=4
            )
            print(
                f' ratio: jax/torch {mid:.3f} of {what} (quartiles {low:.3f}..{high:.3f}, '
                f'{args.pairs} pairs; of the minima {min(jax) / min(torch):.3f})'
            )
