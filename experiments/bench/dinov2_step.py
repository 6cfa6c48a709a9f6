# SPDX-License-Identifier: Apache-2.0
"""One training step of DINOv2 on CPU: this project against a PyTorch twin of the same shapes.

Per image 2 global crops of 8 x 8 patches and 8 local crops of 4 x 4 (the token counts of the
CIFAR-10 recipe), encoder 384 x 6 x 6, two heads 384 -> 1024 -> 1024 -> 256 -> 4096 prototypes.
Both sides do the same work in float32: uint8 crops in, normalisation, masks, the teacher on the
global crops, the student on all, DINO, iBOT and KoLeo under Sinkhorn-Knopp, backward, clipping per
network, AdamW and the teacher's average.

The JAX side is the program of a training run (`step.make_program`), with its monitors and its
guard against non-finite updates, without photometry and stochastic depth. The twin is
idiomatic PyTorch: `scaled_dot_product_attention`, crops of one resolution in one batch, only masked
patches through the head (the JAX side pads them to a fixed number), fused AdamW, `_foreach`
averages. How both are timed: see pairs.py.

Command:
  GLIBC_TUNABLES=glibc.malloc.hugetlb=1 PYTHONPATH=. \\
    python experiments/bench/dinov2_step.py [--pairs 15] [--only jax|torch]
"""

import sys

import pairs

WIDTH, DEPTH, HEADS, PATCH = 384, 6, 6, 16
SIDES = {'global': (2, 128), 'local': (8, 64)}  # crops per image, pixels
HIDDEN, BOTTLENECK, PROTOTYPES = 1024, 256, 4096


def crops(args):
    import numpy as np

    rng = np.random.default_rng(0)
    return {
        name: rng.integers(0, 256, (args.batch, count, side, side, 3), dtype=np.uint8)
        for name, (count, side) in SIDES.items()
    }


def jax_side(args):
    """(function that does a step, versions)."""
    import jax
    import jaxlib
    import numpy as np

    from ssl_jax import config as config_lib
    from ssl_jax import methods
    from ssl_jax import step as step_lib
    from ssl_jax.run import clock as clock_lib

    config = config_lib.default('dinov2')
    config.batch_size = args.batch
    config.total_steps = 1000
    config.mesh.data = 1
    m = config.method
    m.size, m.embed_dim, m.depth, m.num_heads = None, WIDTH, DEPTH, HEADS
    m.patch_size, m.img_size, m.local_size = PATCH, SIDES['global'][1], SIDES['local'][1]
    m.n_local_crops = SIDES['local'][0]
    m.head_hidden_dim = HIDDEN
    m.dino_bottleneck_dim = m.ibot_bottleneck_dim = BOTTLENECK
    m.dino_out_dim = m.ibot_out_dim = PROTOTYPES
    m.flip = m.jitter_prob = m.grey_prob = 0.0
    m.blur, m.solarize = 'none', (0.0, 0.0, 0.0)
    config_lib.shared('dinov2').optim(config.optim)
    config.optim.lr, config.optim.warm_freeze_steps = 1e-4, 0
    method = methods.make(config, clock_lib.Clock.of(config))
    program = step_lib.make_program(config, method)
    jax.set_mesh(program.mesh)
    state, batch = program.init(), crops(args)

    def step():
        nonlocal state
        state, metrics = program.step(state, batch)
        return float(np.asarray(metrics['loss']))

    return step, f'jax {jax.__version__}, jaxlib {jaxlib.__version__}'


def torch_side(args):
    """The same step in idiomatic PyTorch; (function that does a step, versions)."""
    import copy

    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    grid = SIDES['global'][1] // PATCH
    temps = dict(teacher=0.05, student=0.1)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(2))
            self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
            self.ls1, self.ls2 = (nn.Parameter(1e-5 * torch.ones(WIDTH)) for _ in range(2))

        def forward(self, x):
            b, n, d = x.shape
            qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(*qkv.unbind(0))
            x = x + self.ls1 * self.proj(y.transpose(1, 2).reshape(b, n, d))
            return x + self.ls2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
            self.cls_token = nn.Parameter(1e-6 * torch.randn(1, 1, WIDTH))
            self.mask_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
            self.cls_pos = nn.Parameter(0.02 * torch.randn(1, 1, WIDTH))
            self.pos = nn.Parameter(0.02 * torch.randn(1, WIDTH, grid, grid))
            self.blocks = nn.Sequential(*[Block() for _ in range(DEPTH)])
            self.norm = nn.LayerNorm(WIDTH, eps=1e-6)

        def forward(self, images, masks=None):
            x = self.embed(images)
            side = x.shape[-1]
            pos = self.pos
            if side != grid:
                pos = F.interpolate(pos, scale_factor=(side + 0.1) / grid, mode='bicubic')
            x = x.flatten(2).transpose(1, 2)
            if masks is not None:
                x = torch.where(masks[..., None], self.mask_token, x)
            x = x + pos.flatten(2).transpose(1, 2)
            x = torch.cat([(self.cls_token + self.cls_pos).expand(len(x), -1, -1), x], 1)
            return self.norm(self.blocks(x))

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Sequential(
                nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU(),
                nn.Linear(HIDDEN, BOTTLENECK),
            )  # fmt: skip
            last = nn.Linear(BOTTLENECK, PROTOTYPES, bias=False)
            self.last = nn.utils.parametrizations.weight_norm(last)

        def forward(self, x):
            return self.last(F.normalize(self.mlp(x), dim=-1))

    def network():
        return nn.ModuleDict(dict(encoder=Encoder(), dino=Head(), ibot=Head()))

    student = network()
    teacher = copy.deepcopy(student).requires_grad_(False)
    decayed = [p for p in student.parameters() if p.ndim > 1]
    others = [p for p in student.parameters() if p.ndim <= 1]
    groups = [dict(params=decayed, weight_decay=0.04), dict(params=others, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.999), fused=True)

    def random_masks(count):
        """Half of the images have 10 to 50 % of their patches hidden, spread evenly."""
        masks = torch.zeros(count, grid**2, dtype=torch.bool)
        shares = torch.linspace(0.1, 0.5, count // 2 + 1)
        for i, share in zip(torch.randperm(count)[: count // 2].tolist(), shares[1:], strict=True):
            masks[i, torch.randperm(grid**2)[: int(share * grid**2)]] = True
        return masks

    @torch.no_grad()
    def sinkhorn(logits):
        q = torch.exp(logits / temps['teacher']).t()  # (K, n)
        q /= q.sum()
        for _ in range(3):
            q /= q.sum(1, keepdim=True) * len(q)
            q /= q.sum(0, keepdim=True) * q.shape[1]
        return (q * q.shape[1]).t()

    def cross_entropy(targets, logits):
        return -(targets * F.log_softmax(logits / temps['student'], -1)).sum(-1)

    def koleo(x):
        x = F.normalize(x, dim=-1)
        with torch.no_grad():
            nearest = (x @ x.t()).fill_diagonal_(-1).argmax(1)
        return -torch.log(F.pairwise_distance(x, x[nearest], eps=1e-8) + 1e-8).mean()

    mean = torch.tensor((0.485, 0.456, 0.406)).reshape(3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225)).reshape(3, 1, 1)
    batch = {k: torch.from_numpy(x) for k, x in crops(args).items()}

    def by_view(name):
        """(crops, batch, ...) -> one batch, crop by crop."""
        x = batch[name].transpose(0, 1).flatten(0, 1).permute(0, 3, 1, 2)
        return (x / 255 - mean) / std

    def step():
        large, small = by_view('global'), by_view('local')
        masks, n = random_masks(len(large)), args.batch
        taken = masks.flatten().nonzero()[:, 0]
        weights = (masks / masks.sum(1, keepdim=True).clamp(min=1))[masks]
        with torch.no_grad():
            y = teacher['encoder'](large)
            class_targets = sinkhorn(teacher['dino'](y[:, 0])).unflatten(0, (2, n))
            patch_targets = sinkhorn(teacher['ibot'](y[:, 1:].flatten(0, 1)[taken]))
        y, local = student['encoder'](large, masks), student['encoder'](small)
        logits = student['dino'](torch.cat([y[:, 0], local[:, 0]])).unflatten(0, (-1, n))
        patch_logits = student['ibot'](y[:, 1:].flatten(0, 1)[taken])
        terms = 2 + 2 * (len(logits) - 2)
        loss = cross_entropy(class_targets.flip(0), logits[:2]).sum() / (n * terms)
        loss = loss + cross_entropy(class_targets.sum(0), logits[2:]).sum() / (n * terms)
        loss = loss + (weights * cross_entropy(patch_targets, patch_logits)).sum() / (2 * n)
        loss = loss + 0.1 * sum(koleo(x) for x in y[:, 0].unflatten(0, (2, n)))
        optimizer.zero_grad()
        loss.backward()
        for part in student.values():
            nn.utils.clip_grad_norm_(part.parameters(), 3.0)
        optimizer.step()
        with torch.no_grad():
            old, new = list(teacher.parameters()), list(student.parameters())
            torch._foreach_mul_(old, 0.992)
            torch._foreach_add_(old, new, alpha=0.008)
        return loss.item()

    return step, f'torch {torch.__version__}'


if __name__ == '__main__':
    sys.exit(pairs.main(__doc__, {'jax': jax_side, 'torch': torch_side}, batch=16))
