# SPDX-License-Identifier: Apache-2.0
"""How long does a run take to start: compiled anew, with JAX's cache, with kept programs?

Each start is a process of its own with a new workdir, in this order: nothing on disk, JAX's cache
of the first, `--compiled` with a folder that has the programs. It ends with its first step. The
losses and the state after three steps have to be equal, bit by bit. TensorBoard is off, as its
writer imports torch where that is installed, which takes as long as importing all else.

Command:
  python experiments/bench/startup.py [--config scenes_dinov2] [--starts 3] [FIELD=VALUE ...]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

CHILD = """
import sys, time
began = time.monotonic()
import json
import jax
from ssl_jax import config, train
from ssl_jax.run import checksums, compiled, metrics, preempt

marks, losses = {'imports': time.monotonic() - began}, []

def timed(owner, name, label):
    real = getattr(owner, name)
    def call(*args, **kw):
        start = time.monotonic()
        try:
            return real(*args, **kw)
        finally:
            found = label(args)
            marks[found] = marks.get(found, 0) + time.monotonic() - start
    setattr(owner, name, call)

def push(self, step_metrics):
    jax.block_until_ready(step_metrics)
    marks.setdefault('first step', time.monotonic() - began)
    marks.setdefault('processor', time.process_time())
    losses.append(float(step_metrics['loss']))
    if len(losses) == 3:
        raise preempt.Stopped

recipe, workdir, folder, *fields = sys.argv[1:]
timed(train.step_lib, 'make_program', lambda args: 'shapes of the state')
timed(train.start, 'first_state', lambda args: 'first state')
timed(compiled.Kept, 'get', lambda args: args[1])
metrics.NonFinite.push = push
save = train.save
def sums(run, state):
    marks['sums'] = checksums.of(state)
    save(run, state)
train.save = sums
fields += [f'eval.tasks.{x}=None' for x in ('monitors', 'knn', 'accuracy', 'pictures')]
fields.append('log.tensorboard=False')
train.train(config.load(recipe, fields), workdir, folder or None)
print('MARKS', json.dumps({**marks, 'losses': losses}))
"""


def start(args, cache, folder=''):
    """{what: seconds} of one start; sums of its tensors after three steps."""
    env = {**os.environ, 'SSL_JAX_CACHE': cache}
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, '-c', CHILD, args.config, workdir, folder, *args.fields]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return json.loads(done.stdout.rpartition('MARKS ')[2])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--config', default='scenes_dinov2', help='recipe')
    parser.add_argument('--starts', type=int, default=3, help='of each kind; the median is shown')
    parser.add_argument('fields', nargs='*', metavar='FIELD=VALUE')
    args = parser.parse_args()
    found = {'nothing on disk': [], "JAX's cache": [], '--compiled': []}
    with tempfile.TemporaryDirectory() as folder:
        start(args, f'{folder}/unused', f'{folder}/kept')
        for i in range(args.starts):
            cache = f'{folder}/cache{i}'
            found['nothing on disk'].append(start(args, cache))
            found["JAX's cache"].append(start(args, cache))
            found['--compiled'].append(start(args, f'{folder}/other{i}', f'{folder}/kept'))
    ends = {json.dumps([x['sums'], x['losses']]) for rows in found.values() for x in rows}
    rows = {k: {n: statistics.median(x[n] for x in v) for n in TIMES} for k, v in found.items()}
    print(f'{args.config} {" ".join(args.fields)}: seconds, medians of {args.starts} starts')
    print(f'{"":34}' + ''.join(f'{kind:>17}' for kind in rows))
    for name, label in TIMES.items():
        print(f'{label:34}' + ''.join(f'{row[name]:17.2f}' for row in rows.values()))
    for label, names in (('step', ['step']), ('step and first state', ['step', 'first state'])):
        sums = [sum(row[n] for n in names) for row in rows.values()]
        print(f'{label}: --compiled is {sums[0] / sums[2]:.1f} times faster than nothing on disk')
    for label, name in (('all', 'first step'), ('all, in CPU time', 'processor')):
        whole = [row[name] for row in rows.values()]
        print(f'{label}: {whole[0] / whole[2]:.1f} times')
    print(f'equal after three steps, bit by bit: {len(ends) == 1}')


# What the child measures, and what the table says.
TIMES = {
    'imports': 'imports',
    'shapes of the state': 'shapes of the state, traced',
    'first state': 'first state, with its program',
    'step': 'program of the step',
    'first step': 'all, until the first step has ended',
    'processor': 'the same, in CPU time',
}

if __name__ == '__main__':
    main()
