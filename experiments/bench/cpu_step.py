# SPDX-License-Identifier: Apache-2.0
"""One training step on CPU: this project against a PyTorch twin of the same shapes.

Both sides do the same work: uint8 images in, normalisation, Pixio masking (8 class tokens, 75 % of
the 4 x 4 blocks hidden: 8 + 64 encoder and 8 + 256 decoder tokens), forward, backward and AdamW, in
float32. The JAX side is the program of a training run (`train.make_program`), with its gradient
norm and its guard against non-finite updates; the twin is what one would write in PyTorch, with
`scaled_dot_product_attention` and the fused AdamW. Each side has a process of its own, for two
pools of threads in one process disturb each other; their steps alternate, so that both meet the
same neighbours on a shared machine, and the ratio is the median over pairs of steps. Busy cores
make it meaningless, in favour of JAX: PyTorch's threads then wait for each other far longer.

Command:
  PYTHONPATH=. python experiments/bench/cpu_step.py [--pairs 15] [--threads 2] [--only jax|torch]
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import sys
import time

from ssl_jax import hugepages


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--pairs', type=int, default=15, help='timed pairs of steps, at least 2')
    parser.add_argument('--threads', type=int, default=2, help='cores, the same for both sides')
    parser.add_argument('--batch', type=int, default=16, help='images per step')
    parser.add_argument('--only', choices=('jax', 'torch'), help='time one side alone')
    return parser.parse_args(argv)


def jax_side(batch_size):
    """(step function of a batch of uint8 images that returns the loss, description)."""
    import jax
    import jaxlib
    import numpy as np

    from ssl_jax import config as config_lib
    from ssl_jax import methods, train

    config = config_lib.default()
    config.batch_size = batch_size
    config.total_steps = 1000
    config.mesh.data = 1
    m = config.method
    m.embed_dim, m.depth, m.num_heads, m.size = 384, 12, 6, None
    m.decoder_embed_dim, m.decoder_depth, m.decoder_num_heads = 256, 4, 8
    m.img_size, m.patch_size, m.num_cls_tokens, m.mask_grid = 256, 16, 8, 4
    m.pos_embed, m.flip = 'learned', 0.0
    config.optim.lr = 1e-4
    method = methods.from_config(config)
    program = train.make_program(config, method, config_lib.clock(config))
    jax.set_mesh(program.mesh)
    state = program.init()

    def step(images):
        nonlocal state
        state, metrics = program.step(state, {'image': images[:, None]})
        return float(np.asarray(metrics['loss']))

    return step, f'jax {jax.__version__}, jaxlib {jaxlib.__version__}'


def torch_side(threads):
    """The same step in PyTorch, written as its users write it."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    patch, grid, cls, width, dec_width = 16, 16, 8, 384, 256

    class Block(nn.Module):
        def __init__(self, dim, heads):
            super().__init__()
            self.heads = heads
            self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
            self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
            self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

        def forward(self, x):
            b, n, d = x.shape
            qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(*qkv.unbind(0))
            x = x + self.proj(y.transpose(1, 2).reshape(b, n, d))
            return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()

            def table(*shape):
                return nn.Parameter(0.02 * torch.randn(1, *shape))

            self.embed = nn.Conv2d(3, width, patch, patch)
            self.cls_token, self.mask_token = table(cls, width), table(1, dec_width)
            self.pos, self.dec_pos = table(cls + grid**2, width), table(cls + grid**2, dec_width)
            self.blocks = nn.Sequential(*[Block(width, 6) for _ in range(12)])
            self.norm = nn.LayerNorm(width, eps=1e-6)
            self.dec_embed = nn.Linear(width, dec_width)
            self.dec_blocks = nn.Sequential(*[Block(dec_width, 8) for _ in range(4)])
            self.dec_norm = nn.LayerNorm(dec_width, eps=1e-6)
            self.pred = nn.Linear(dec_width, 3 * patch**2)

        def forward(self, images):
            b = len(images)
            keep, restore, mask = random_mask(b)
            x = self.embed(images).flatten(2).transpose(1, 2) + self.pos[:, cls:]
            x = torch.gather(x, 1, keep[..., None].expand(-1, -1, width))
            x = torch.cat([(self.cls_token + self.pos[:, :cls]).expand(b, -1, -1), x], 1)
            x = self.dec_embed(self.norm(self.blocks(x)))
            hidden = self.mask_token.expand(b, grid**2 - keep.shape[1], -1)
            y = torch.cat([x[:, cls:], hidden], 1)
            y = torch.gather(y, 1, restore[..., None].expand(-1, -1, dec_width))
            x = torch.cat([x[:, :cls], y], 1) + self.dec_pos
            pred = self.pred(self.dec_norm(self.dec_blocks(x)))[:, cls:]
            target = images.reshape(b, 3, grid, patch, grid, patch).permute(0, 2, 4, 3, 5, 1)
            target = target.reshape(b, grid**2, -1)
            mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
            error = (pred - (target - mean) / (var + 1e-6) ** 0.5).square().mean(-1)
            return (error * mask).sum() / mask.sum()

    def random_mask(b):
        ids = torch.arange(grid**2).reshape(4, 4, 4, 4).transpose(1, 2).reshape(16, 16)
        order = ids[torch.rand(b, 16).argsort(1)].reshape(b, -1)
        restore = order.argsort(1)
        kept = grid**2 // 4
        return order[:, :kept], restore, (restore >= kept).float()

    model = Model()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    mean = torch.tensor((0.485, 0.456, 0.406)).reshape(3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225)).reshape(3, 1, 1)

    def step(images):
        x = torch.from_numpy(images).permute(0, 3, 1, 2)
        loss = model((x / 255 - mean) / std)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, f'torch {torch.__version__}'


def serve(name, args, pipe):
    """The process of one side: says hello, then times a step whenever it is asked to."""
    import numpy as np

    step, versions = jax_side(args.batch) if name == 'jax' else torch_side(args.threads)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (args.batch, 256, 256, 3), dtype=np.uint8)
    step(images), step(images)  # compilation and first touches
    pipe.send(versions)
    while pipe.recv():
        start = time.perf_counter()
        step(images)
        pipe.send(time.perf_counter() - start)


def main(argv=None):
    if argv is None:
        hugepages.restart()  # as the command line of the project does; both sides run with it
    args = parse_args(argv)
    # XLA sizes its thread pool by the cores that the process may use when it starts.
    if hasattr(os, 'sched_setaffinity'):
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < args.threads:
            raise ValueError(f'--threads {args.threads} is more than the {len(cores)} cores here.')
        os.sched_setaffinity(0, cores[-args.threads :])
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')

    context = multiprocessing.get_context('spawn')
    pipes, versions, processes = {}, [], []
    for name in [args.only] if args.only else ['jax', 'torch']:
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(name, args, theirs), daemon=True))
        processes[-1].start()
        theirs.close()  # so that a side that fails ends the wait with EOFError
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


def report(args, versions, times):
    malloc = os.environ.get(hugepages.VARIABLE) or 'default malloc'
    print(f'{args.threads} threads, {malloc}, python {platform.python_version()}, '
          f'{", ".join(versions)}')
    for name, t in times.items():
        middle = statistics.median(t)
        print(f'{name:>6}: median {1e3 * middle:6.0f} ms, min {1e3 * min(t):6.0f} ms, '
              f'{args.batch / middle:5.1f} images/s')
    if len(times) == 2:
        ratio = [j / t for j, t in zip(times['jax'], times['torch'])]
        low, mid, high = statistics.quantiles(ratio, n=4)
        print(f' ratio: jax/torch {mid:.3f} (quartiles {low:.3f}..{high:.3f}, {args.pairs} pairs; '
              f'of the minima {min(times["jax"]) / min(times["torch"]):.3f})')


if __name__ == '__main__':
    sys.exit(main())
