# SPDX-License-Identifier: Apache-2.0
"""One training step on CPU: this project against a PyTorch twin of the same shapes.

Both sides do the same work: uint8 images in, normalisation, Pixio masking (8 class tokens, 75 % of
the 4 x 4 blocks hidden: 8 + 64 encoder and 8 + 256 decoder tokens), forward, backward and AdamW, in
float32. The JAX side is the program of a training run (`step.make_program`), with its gradient
norm and its guard against non-finite updates; the twin is idiomatic PyTorch, with
`scaled_dot_product_attention` and the fused AdamW. How both are timed: see pairs.py.

Command:
  GLIBC_TUNABLES=glibc.malloc.hugetlb=1 PYTHONPATH=. \\
    python experiments/bench/cpu_step.py [--pairs 15] [--threads 2] [--only jax|torch]
"""

import sys

import pairs


def images(args):
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (args.batch, 256, 256, 3), dtype=np.uint8)


def jax_side(args):
    """(function that does a step, versions)."""
    import jax
    import jaxlib
    import numpy as np

    from ssl_jax import config as config_lib
    from ssl_jax import methods
    from ssl_jax import step as step_lib
    from ssl_jax.run import clock as clock_lib

    config = config_lib.default()
    config.batch_size = args.batch
    config.total_steps = 1000
    config.mesh.data = 1
    m = config.method
    m.embed_dim, m.depth, m.num_heads, m.size = 384, 12, 6, None
    m.decoder_embed_dim, m.decoder_depth, m.decoder_num_heads = 256, 4, 8
    m.img_size, m.patch_size, m.num_cls_tokens, m.mask_grid = 256, 16, 8, 4
    m.pos_embed, m.flip = 'learned', 0.0
    config.optim.lr = 1e-4
    method = methods.make(config, clock_lib.Clock.of(config))
    program = step_lib.make_program(config, method)
    jax.set_mesh(program.mesh)
    state, batch = program.init(), {'image': images(args)[:, None]}

    def step():
        nonlocal state
        state, metrics = program.step(state, batch)
        return float(np.asarray(metrics['loss']))

    return step, f'jax {jax.__version__}, jaxlib {jaxlib.__version__}'


def torch_side(args):
    """The same step in idiomatic PyTorch; (function that does a step, versions)."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.set_num_threads(args.threads)
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

    batch = torch.from_numpy(images(args))

    def step():
        x = batch.permute(0, 3, 1, 2)
        loss = model((x / 255 - mean) / std)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, f'torch {torch.__version__}'


if __name__ == '__main__':
    sys.exit(pairs.main(__doc__, {'jax': jax_side, 'torch': torch_side}, batch=16))
