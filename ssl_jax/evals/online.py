# SPDX-License-Identifier: Apache-2.0
"""What the loop looks at now and then: kNN, accuracy, collapse monitors, pictures."""

import functools

import jax
import numpy as np

from ssl_jax import sharding
from ssl_jax.data import sources
from ssl_jax.data import stream as stream_lib
from ssl_jax.evals import accuracy, features, knn, monitors

MONITORED = 512  # images that the collapse monitors look at


class Evaluator:
    """evaluate(state, step) -> {name: float}; pictures go to workdir/pictures.

    kNN runs where the config names a labelled `data.eval_train` and `data.eval_test`; the monitors
    and pictures fall back to the training images.  A classifier is scored on `data.eval_test`.
    `should_stop` ends a long evaluation early.
    """

    def __init__(self, config, method, mesh, workdir, train_source, should_stop):
        data = config.data
        self.config, self.method, self.mesh = config.eval, method, mesh
        self.workdir, self.should_stop = workdir, should_stop

        def opened(spec):
            if not spec:
                return None
            return train_source if spec == data.train else sources.open_source(spec)

        self.train, self.test = opened(data.eval_train), opened(data.eval_test)
        self.shown = self.test if self.test is not None else train_source
        self.size = config.eval.size or method.views()[0].size
        self.classifies = hasattr(method, 'logits')
        if self.classifies and self.test is not None:
            accuracy.check_classes(method.classes, self.test)
        self.keys = jax.random.split(jax.random.key(config.seed), config.eval.num_pictures)

    def __call__(self, state, step):
        """Numbers for metrics.jsonl; raises features.Stopped where `should_stop` ended it."""
        if self.classifies:  # its features are meant to collapse onto the classes
            return self.accuracy(state) if self.test is not None else {}
        vit, params = self.method.backbone(state.params, state.extra)
        forward = features.make_forward(vit, params)
        rows = self.monitors(forward)
        if self.config.knn and self.train is not None and self.test is not None:
            rows.update(self.knn(forward))
        if self.config.pictures:
            self.pictures(state, step)
        return rows

    def accuracy(self, state):
        """test/top1, test/top5 in percent and test/loss; ema/... of the averaged weights."""
        found = accuracy.accuracy(
            self.method,
            state.params,
            state.extra,
            self.test,
            size=self.config.size,
            batch_size=self.config.batch_size,
            mesh=self.mesh,
            limit=self.config.max_test,
            should_stop=self.should_stop,
        )
        scores = ('top1', 'top5', 'loss')
        rows = {f'{name}/{k}': x[k] for name, x in found.items() for k in scores}
        return {**rows, 'test/images': found['test']['n']}

    def extract(self, forward, source, limit):
        return features.extract(
            forward,
            source,
            size=self.size,
            batch_size=self.config.batch_size,
            mesh=self.mesh,
            limit=limit,
            should_stop=self.should_stop,
        )

    def monitors(self, forward):
        found, _ = self.extract(forward, self.shown, MONITORED)
        x = found.get(getattr(self.method, 'monitored', 'cls'), found['patch'])
        values = {k: float(v) for k, v in monitors.monitors(x).items()}
        sentence = monitors.suspect(values)
        if sentence and jax.process_index() == 0:
            print(sentence, flush=True)
        return {f'features/{k}': v for k, v in values.items() if k != 'rankme_max'}

    def knn(self, forward):
        """Top-1 in percent for every feature and k: knn/<feature>/<k>."""
        train, train_y = self.extract(forward, self.train, self.config.max_train)
        test, test_y = self.extract(forward, self.test, self.config.max_test)
        rows = {}
        for name in ('cls_pre', 'cls', 'patch'):
            if name in train:
                found = knn.knn(
                    train[name],
                    train_y,
                    test[name],
                    test_y,
                    ks=self.config.knn_k,
                    temperature=self.config.temperature,
                    num_classes=int(max(train_y.max(), test_y.max())) + 1,
                    mesh=self.mesh,
                )
                rows.update({f'knn/{name}/{k}': v['top1'] for k, v in found.items()})
        return rows

    def pictures(self, state, step):
        """The same images with the same masks at every step, so that progress can be seen."""
        from ssl_jax.viz import draw  # matplotlib is slow to import

        folder = self.workdir / 'pictures'
        if hasattr(self.method, 'reconstruct'):
            size = self.method.views()[0].size
            images = spread_images(self.shown, size, self.config.num_pictures)
            keys = self.keys[: len(images)]
            made = _reconstruct(self.method, self.mesh, state.params, state.extra, images, keys)
            if made and jax.process_index() == 0:
                draw.reconstruction_grid(made, folder / f'reconstruction_{step:07d}.png')

    def curves(self):
        """Redraws workdir/pictures/curves.png from the metrics written so far."""
        from ssl_jax.viz import draw

        if self.config.pictures and jax.process_index() == 0:
            draw.curves(self.workdir / 'metrics.jsonl', self.workdir / 'pictures' / 'curves.png')


def _reconstruct(method, mesh, *args):
    """Runs `method.reconstruct`, every process the whole, and returns numpy arrays."""
    run = _jitted_reconstruct(method, sharding.replicated(mesh))
    return jax.tree.map(np.asarray, run(*args))


@functools.lru_cache
def _jitted_reconstruct(method, replicated):
    return jax.jit(method.reconstruct, out_shardings=replicated)


def spread_images(source, size, count):
    """uint8 (count, size, size, 3): one image from each of `count` equal parts of a source.

    Parts, as sources are often sorted by class; a random place in each, always the same, as in
    others the classes take turns, and even steps would meet few of them.  One that does not decode
    gives way to another; of a source too small or broken come fewer.
    """
    n = len(source)
    edges = np.arange(min(count, n) + 1) * n // min(count, n)
    spread = np.random.default_rng(0).integers(edges[:-1], edges[1:])
    order = dict.fromkeys(((spread + np.arange(4)[:, None]) % n).reshape(-1).tolist())
    images, some = [], features.Subset(source, list(order))
    with stream_lib.eval_stream(some, size, len(spread)) as stream:
        for batch in stream:
            images.extend(batch['image'][batch['mask']])
            if len(images) >= count:
                break
    return np.stack(images[:count])
