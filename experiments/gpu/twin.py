# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch twins of a training step: MAE, Pixio and DINOv2 in the shapes of a method's fields.

bfloat16 by autocast over float32 parameters, `scaled_dot_product_attention` (flash attention on a
GPU), `torch.compile` of the blocks and losses (of the whole model it takes minutes), fused AdamW.
Neither side has stochastic depth, flips or photometry. Masks of DINOv2 are drawn before the steps,
as loaders do; every step has the same ones.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F


def table(*shape):
    return nn.Parameter(0.02 * torch.randn(1, *shape))


class Block(nn.Module):
    def __init__(self, dim, heads, layer_scale):
        super().__init__()
        self.heads, self.scaled = heads, layer_scale is not None
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        if self.scaled:
            self.ls1, self.ls2 = (nn.Parameter(layer_scale * torch.ones(dim)) for _ in range(2))

    def forward(self, x):
        b, n, d = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).reshape(b, n, d)
        y = self.proj(y)
        x = x + (self.ls1 * y if self.scaled else y)
        y = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + (self.ls2 * y if self.scaled else y)


class Trunk(nn.Sequential):
    """Blocks and the norm behind them."""

    def __init__(self, depth, dim, heads, layer_scale=None):
        blocks = [Block(dim, heads, layer_scale) for _ in range(depth)]
        super().__init__(*blocks, nn.LayerNorm(dim, eps=1e-6))


class MAE(nn.Module):
    """MAE, and Pixio with `num_cls_tokens`, `mask_grid` and learned positions."""

    def __init__(self, m, batch):
        super().__init__()
        self.m, self.n, c = m, m.num_patches, m.num_cls_tokens
        dim, wide, p = m.embed_dim, m.decoder_embed_dim, m.patch_size
        self.embed = nn.Conv2d(3, dim, p, p)
        self.cls_token, self.mask_token = table(c, dim), table(1, wide)
        self.pos, self.dec_pos = table(c + self.n, dim), table(c + self.n, wide)
        for pos in (self.pos, self.dec_pos):  # a fixed table, whatever is in it
            pos.requires_grad_(m.pos_embed == 'learned')
        self.trunk, self.dec_embed = Trunk(m.depth, dim, m.num_heads), nn.Linear(dim, wide)
        self.decoder = Trunk(m.decoder_depth, wide, m.decoder_num_heads)
        self.pred, self.trained = nn.Linear(wide, 3 * p**2), [self]

    def mask(self, b, device):
        """(ids of kept patches, places of all, 1 where hidden): whole squares are hidden."""
        g, side = self.m.mask_grid, self.m.grid[0] // self.m.mask_grid
        ids = torch.arange(self.n, device=device).reshape(side, g, side, g).transpose(1, 2)
        order = ids.reshape(side**2, g * g)[torch.rand(b, side**2, device=device).argsort(1)]
        kept = int(side**2 * (1 - self.m.mask_ratio)) * g * g
        order = order.reshape(b, -1)
        restore = order.argsort(1)
        return order[:, :kept], restore, (restore >= kept).float()

    def forward(self, images):
        images = normal(images)
        b, c = len(images), self.m.num_cls_tokens
        keep, restore, hidden = self.mask(b, images.device)
        x = self.embed(images).flatten(2).transpose(1, 2) + self.pos[:, c:]
        x = torch.gather(x, 1, keep[..., None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([(self.cls_token + self.pos[:, :c]).expand(b, -1, -1), x], 1)
        x = self.dec_embed(self.trunk(x))
        fill = self.mask_token.to(x.dtype).expand(b, self.n - keep.shape[1], -1)
        y = torch.cat([x[:, c:], fill], 1)
        y = torch.gather(y, 1, restore[..., None].expand(-1, -1, x.shape[-1]))
        x = self.decoder(torch.cat([x[:, :c], y], 1) + self.dec_pos)
        return masked_error(self.pred(x)[:, c:], images, hidden, self.m.patch_size)

    def after(self):
        pass


class Encoder(nn.Module):
    def __init__(self, m):
        super().__init__()
        dim, side = m.embed_dim, m.grid[0]
        self.embed = nn.Conv2d(3, dim, m.patch_size, m.patch_size)
        self.cls_token, self.mask_token, self.cls_pos = (table(1, dim) for _ in range(3))
        self.pos = table(dim, side, side)
        self.trunk = Trunk(m.depth, dim, m.num_heads, m.layer_scale)

    def forward(self, images, masks=None):
        x, pos = self.embed(images), self.pos
        if x.shape[-1] != pos.shape[-1]:
            pos = F.interpolate(pos, size=x.shape[-2:], mode='bicubic')
        x = x.flatten(2).transpose(1, 2)
        if masks is not None:
            x = torch.where(masks[..., None], self.mask_token.to(x.dtype), x)
        x = x + pos.flatten(2).transpose(1, 2)
        return self.trunk(torch.cat([(self.cls_token + self.cls_pos).expand(len(x), -1, -1), x], 1))


class Head(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(m.embed_dim, m.head_hidden_dim), nn.GELU())
        self.mlp.extend([nn.Linear(m.head_hidden_dim, m.head_hidden_dim), nn.GELU()])
        self.mlp.append(nn.Linear(m.head_hidden_dim, m.dino_bottleneck_dim))
        last = nn.Linear(m.dino_bottleneck_dim, m.dino_out_dim, bias=False)
        self.last = nn.utils.parametrizations.weight_norm(last)

    def forward(self, x):
        return self.last(F.normalize(self.mlp(x), dim=-1))


class DINOv2(nn.Module):
    """One head for class and patch tokens, softmax centring, KoLeo, as in the short recipe."""

    def __init__(self, m, batch):
        super().__init__()
        self.b = batch
        self.student = nn.ModuleDict(dict(encoder=Encoder(m), head=Head(m)))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.trained = [*self.student.values()]
        self.register_buffer('centers', torch.zeros(2, m.dino_out_dim))
        masks = torch.zeros(2 * batch, m.num_patches, dtype=torch.bool)  # half of the crops
        shares = torch.linspace(*m.mask_ratio_min_max, batch + 1)[1:]
        for i, share in zip(torch.randperm(2 * batch)[:batch].tolist(), shares, strict=True):
            masks[i, torch.randperm(m.num_patches)[: int(share * m.num_patches)]] = True
        self.register_buffer('masks', masks)
        self.register_buffer('taken', masks.flatten().nonzero()[:, 0])
        self.register_buffer('weights', (masks / masks.sum(1, keepdim=True).clamp(min=1))[masks])

    def targets(self, tokens, k):
        logits = self.teacher['head'](tokens)
        found = softmax(logits, self.centers[k])
        self.centers[k].lerp_(logits.float().mean(0), 0.1)
        return found

    def forward(self, large, small):
        large, small, b = normal(large), normal(small), self.b
        with torch.no_grad():
            y = self.teacher['encoder'](large)
            classes = self.targets(y[:, 0], 0).unflatten(0, (2, b))
            patches = self.targets(y[:, 1:].flatten(0, 1)[self.taken], 1)
        y, local = self.student['encoder'](large, self.masks), self.student['encoder'](small)
        tokens = torch.cat([y[:, 0], local[:, 0], y[:, 1:].flatten(0, 1)[self.taken]])
        logits, masked = self.student['head'](tokens).tensor_split([2 * b + len(local)])
        logits = logits.unflatten(0, (-1, b))
        terms = 2 + 2 * (len(logits) - 2)
        loss = entropy(classes.flip(0), logits[:2]).sum() / (b * terms)
        loss = loss + entropy(classes.sum(0), logits[2:]).sum() / (b * terms)
        loss = loss + (self.weights * entropy(patches, masked)).sum() / (2 * b)
        return loss + 0.1 * sum(koleo(x) for x in y[:, 0].unflatten(0, (2, b)))

    @torch.no_grad()
    def after(self):
        """Between backward and update: the teacher's average, gradients clipped per network."""
        old, new = list(self.teacher.parameters()), list(self.student.parameters())
        torch._foreach_lerp_(old, new, 0.008)
        for net in self.trained:
            nn.utils.clip_grad_norm_(net.parameters(), 3.0)


def normal(images):
    """uint8 (B, H, W, 3) -> normalised (B, 3, H, W)."""
    rows = torch.tensor(((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), device=images.device)
    return (images.permute(0, 3, 1, 2) / 255 - rows[0, :, None, None]) / rows[1, :, None, None]


def masked_error(pred, images, hidden, p):
    """Mean squared error of hidden patches, normalised per patch."""
    target = images.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 4, 5, 1).reshape(pred.shape)
    mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
    error = (pred.float() - (target - mean) / (var + 1e-6).sqrt()).square().mean(-1)
    return (error * hidden).sum() / hidden.sum()


def softmax(logits, center):
    return F.softmax((logits.float() - center) / 0.05, -1)


def entropy(targets, logits):
    return -(targets * F.log_softmax(logits.float() / 0.1, -1)).sum(-1)


def koleo(x):
    x = F.normalize(x.float(), dim=-1)
    nearest = (x @ x.t()).detach().fill_diagonal_(-1).argmax(1)
    return -torch.log(F.pairwise_distance(x, x[nearest], eps=1e-8) + 1e-8).mean()


def make(m, batch, device):
    """(function that does a step and returns the loss as a tensor, number of parameters).

    Args:
      m: our method; its fields and views are the shapes.
    """
    torch.manual_seed(0)
    torch.set_float32_matmul_precision('high')
    model = (DINOv2 if hasattr(m, 'dino_out_dim') else MAE)(m, batch).to(device)
    how = dict(dynamic=False, backend='inductor' if device == 'cuda' else 'aot_eager')
    for part in model.modules():
        if isinstance(part, Block):
            part.compile(**how)
    for fn in (softmax, entropy, masked_error, normal):
        globals()[fn.__name__] = torch.compile(fn, **how)
    params = [p for net in model.trained for p in net.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in params if p.ndim > 1], weight_decay=0.05)]
    groups += [dict(params=[p for p in params if p.ndim <= 1], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    sizes = [(v.count * batch, v.size, v.size, 3) for v in m.views()]
    inputs = [torch.randint(256, s, dtype=torch.uint8, device=device) for s in sizes]

    def step():
        with torch.autocast(device, torch.bfloat16):
            loss = model(*inputs)
        optimizer.zero_grad()
        loss.backward()
        model.after()
        optimizer.step()
        return loss.detach()

    return step, sum(p.numel() for p in params)
