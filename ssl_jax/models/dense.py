# SPDX-License-Identifier: Apache-2.0
"""Heads that predict a class or a depth for every pixel from the tokens of a frozen encoder.

A head takes taps, [(patch (B, h, w, D), cls (B, D) or None), ...] of one block each, the deepest
last, and returns a map of `size` pixels: logits (B, H, W, K), or depth (B, H, W) in metres. Modules
and parameters are named as in the official files of heads, with `x_0` for `x.0`; see
`interop.heads`. All is float32.
"""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.models import blocks

Taps = Sequence[tuple[jax.Array, jax.Array | None]]
zeros = nn.initializers.zeros
BN_EPS, BN_MOMENTUM = 1e-5, 0.1  # torch's defaults


@functools.lru_cache
def bilinear_weights(n_in: int, n_out: int, align_corners: bool) -> np.ndarray:
    """Matrix (n_out, n_in) of a bilinear resize along one axis without antialias, float32.

    Args:
      align_corners: whether the centres of the outer pixels stay (torch's argument); otherwise
        their outer edges do.
    """
    if align_corners:
        x = np.arange(n_out) * ((n_in - 1) / max(n_out - 1, 1))
    else:
        x = np.clip((np.arange(n_out) + 0.5) * n_in / n_out - 0.5, 0, None)
    low = np.minimum(x.astype(int), n_in - 1)
    weights = np.zeros((n_out, n_in))
    np.add.at(weights, (np.arange(n_out), low), 1 - (x - low))
    np.add.at(weights, (np.arange(n_out), np.minimum(low + 1, n_in - 1)), x - low)
    return weights.astype(np.float32)


def bilinear(x: jax.Array, size: tuple[int, int], align_corners: bool) -> jax.Array:
    """Resizes (B, h, w, C) to (B, *size, C), see `bilinear_weights`.

    References:
      torch `F.interpolate(mode='bilinear')`
    """
    if x.shape[1:3] == tuple(size):
        return x
    # As products, whose gradients are products too: gathers would have scatters.
    rows, columns = (
        bilinear_weights(n, m, align_corners) for n, m in zip(x.shape[1:3], size, strict=True)
    )
    x = jnp.einsum('yh,bhwc->bywc', rows, x, precision='highest')
    return jnp.einsum('xw,bywc->byxc', columns, x, precision='highest')


def joined(taps: Taps, with_cls: bool) -> jax.Array:
    """Channels of all taps side by side, (B, h, w, sum): each patch map, then its class token."""
    out = []
    for patch, cls in taps:
        out.append(patch)
        if with_cls and cls is not None:
            out.append(jnp.broadcast_to(cls[:, None, None], patch.shape))
    return jnp.concatenate(out, axis=-1).astype(jnp.float32)


class Conv(nn.Module):
    """Convolution with zero padding of half the kernel; starts as torch's Conv2d does.

    Parameters: kernel (k, k, in, out) and bias (out,).
    """

    features: int
    size: int = 3  # k
    stride: int = 1
    bias: bool = True
    kernel_init: Callable | None = None  # default: torch's, of the bias too; otherwise it is 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        k, n = self.size, x.shape[-1]
        default = blocks.torch_uniform(k * k * n)
        kernel = self.param('kernel', self.kernel_init or default, (k, k, n, self.features))
        if k == 1:
            x = x @ kernel[0, 0]
        else:
            x = jax.lax.conv_general_dilated(
                x,
                kernel,
                (self.stride, self.stride),
                [(k // 2, k // 2)] * 2,
                dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
            )
        if not self.bias:
            return x
        return x + self.param('bias', zeros if self.kernel_init else default, (self.features,))


class Expand(nn.Module):
    """Transposed convolution whose stride is its kernel: each pixel becomes k x k pixels.

    Parameters: kernel (k, k, in, out) and bias (out,).
    """

    features: int
    size: int  # k

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        k, (b, h, w, n) = self.size, x.shape
        init = blocks.torch_uniform(k * k * self.features)
        kernel = self.param('kernel', init, (k, k, n, self.features))
        x = jnp.einsum('bhwn,ijno->bhiwjo', x, kernel).reshape(b, h * k, w * k, self.features)
        return x + self.param('bias', init, (self.features,))


class BatchNorm(nn.Module):
    """BatchNorm2d of torch: running variances are unbiased, statistics are of the whole batch.

    On a mesh these are of all devices, as in SyncBatchNorm. Parameters: scale, bias (C,); in the
    collection batch_stats: mean, var (C,).
    """

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        c = x.shape[-1]
        scale, bias = (
            self.param('scale', nn.initializers.ones, (c,)),
            self.param('bias', zeros, (c,)),
        )
        running = [
            self.variable('batch_stats', name, make, (c,))
            for name, make in (('mean', jnp.zeros), ('var', jnp.ones))
        ]
        mean, var = (r.value for r in running)
        if train:
            mean, var = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
            if not self.is_initializing():
                n = x.size // c
                for old, new in zip(running, (mean, var * (n / max(n - 1, 1))), strict=True):
                    old.value = (1 - BN_MOMENTUM) * old.value + BN_MOMENTUM * new
        return (x - mean) * (jax.lax.rsqrt(var + BN_EPS) * scale) + bias


def scaled(x: jax.Array, max_depth: float | None) -> jax.Array:
    """Logits as they are, or with `max_depth` the depth of the first channel, by a sigmoid."""
    return x if max_depth is None else max_depth * nn.sigmoid(x[..., 0])


class BNLinear(nn.Module):
    """BatchNorm and one linear layer for each patch, resized to the pixels.

    References:
      DINOv2 `eval/segmentation/models/decode_heads/linear_head.py` (names bn, conv_seg); Pixio
      `semseg/models/linear.py`, `monodepth/models/linear.py` (names 0, 1)
    """

    outputs: int  # K; 1 for a depth
    with_cls: bool = False  # whether the class token is beside each patch
    names: tuple[str, str] = ('bn', 'conv_seg')
    align_corners: bool = False
    max_depth: float | None = None  # see `scaled`

    @nn.compact
    def __call__(self, taps: Taps, size: tuple[int, int] | None = None, train: bool = False):
        norm, linear = self.names
        x = BatchNorm(name=norm)(joined(taps, self.with_cls), train)
        init = nn.initializers.normal(0.01) if linear == 'conv_seg' else None
        x = Conv(self.outputs, 1, kernel_init=init, name=linear)(x)
        return scaled(bilinear(x, size, self.align_corners) if size else x, self.max_depth)


class DepthLinear(nn.Module):
    """One linear layer for each patch with its class token, to bins of depth or to a depth.

    The depth is the mean of the bins, evenly spaced from `min_depth` to `max_depth`, under weights
    of each bin: relu(logit) + 0.1 ('linear'), exp(logit) ('softmax') or its sigmoid, over their
    sum. With one bin it is relu(logit) + `min_depth`.

    References:
      DINOv2 `hub/depth/decode_heads.py: BNHead`
    """

    min_depth: float
    max_depth: float
    bins: int = 256
    norm: str = 'linear'
    upsample: int = 4  # of the patches, before the bins are weighted

    @nn.compact
    def __call__(self, taps: Taps, size: tuple[int, int] | None = None, train: bool = False):
        del train
        x = Conv(self.bins, 1, name='conv_depth')(joined(taps, True))
        # Before the layer in the official code, which is the same: weights of a resize sum to 1.
        x = bilinear(x, tuple(self.upsample * n for n in x.shape[1:3]), False)
        if self.bins == 1:
            x = nn.relu(x) + self.min_depth
        else:
            x = {
                'linear': lambda x: nn.relu(x) + 0.1,
                'softmax': nn.softmax,
                'sigmoid': nn.sigmoid,
            }[self.norm](x)
            centres = jnp.linspace(self.min_depth, self.max_depth, self.bins)
            x = jnp.dot(x, centres[:, None], precision='highest') / x.sum(axis=-1, keepdims=True)
        return (bilinear(x, size, False) if size else x)[..., 0]


def _resized(i, x, channels):
    """Layer i of the four that bring taps to 4, 2, 1 and 1/2 times the grid of patches."""
    name = f'resize_layers_{i}'
    if i < 2:
        return Expand(channels, (4, 2)[i], name=name)(x)
    return x if i == 2 else Conv(channels, stride=2, name=name)(x)


class _Residual(nn.Module):
    """x + conv(relu(conv(relu(x)))), in the names of Pixio."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = Conv(x.shape[-1], name='conv1')(nn.relu(x))
        return x + Conv(x.shape[-1], name='conv2')(nn.relu(y))


class _Refine(nn.Module):
    """Adds a tap to what comes from below and resizes, in the names of Pixio."""

    @nn.compact
    def __call__(self, x, tap, size):
        # The official deepest unit has this layer too, and no use for it: there x is None.
        unit = _Residual(name='resConfUnit1')(tap)
        x = tap if x is None else x + unit
        x = bilinear(_Residual(name='resConfUnit2')(x), size, True)
        return Conv(x.shape[-1], 1, name='out_conv')(x)


class _Scratch(nn.Module):
    """The fusion of four taps, in the names of Pixio."""

    outputs: int
    features: int

    @nn.compact
    def __call__(self, taps):
        taps = [
            Conv(self.features, bias=False, name=f'layer{i}_rn')(x) for i, x in enumerate(taps, 1)
        ]
        x = None
        for i in (4, 3, 2, 1):
            tap = taps[i - 1]
            size = taps[i - 2].shape[1:3] if i > 1 else tuple(2 * n for n in tap.shape[1:3])
            x = _Refine(name=f'refinenet{i}')(x, tap, size)
        x = nn.relu(Conv(self.features, name='output_conv_0')(x))
        return Conv(self.outputs, 1, name='output_conv_2')(x)


class PixioDPT(nn.Module):
    """Pixio's form of the DPT head: four taps with class tokens, fused from deep to shallow.

    References:
      Pixio `semseg/models/dpt.py`, `monodepth/models/dpt.py`; Ranftl et al., arXiv 2103.13413
    """

    outputs: int  # K; 1 for a depth
    features: int = 256
    channels: tuple = (256, 512, 1024, 1024)  # of the taps
    max_depth: float | None = None  # see `scaled`

    @nn.compact
    def __call__(self, taps: Taps, size: tuple[int, int] | None = None, train: bool = False):
        del train
        maps = []
        for i, (tap, channels) in enumerate(zip(taps, self.channels, strict=True)):
            x = Conv(channels, 1, name=f'projects_{i}')(joined([tap], True))
            maps.append(_resized(i, x, channels))
        x = _Scratch(self.outputs, self.features, name='scratch')(maps)
        return scaled(bilinear(x, size, True) if size else x, self.max_depth)


# mmcv's ConvModule: He's normal by the outputs, biases 0.
_module_init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


class _ConvModule(nn.Module):
    """A layer `conv`, in the names of mmcv."""

    features: int
    size: int = 3
    bias: bool = True

    @nn.compact
    def __call__(self, x):
        return Conv(self.features, self.size, 1, self.bias, _module_init, name='conv')(x)


class _Unit(nn.Module):
    """`_Residual` without biases, in the names of DINOv2."""

    @nn.compact
    def __call__(self, x):
        y = _ConvModule(x.shape[-1], bias=False, name='conv1')(nn.relu(x))
        return x + _ConvModule(x.shape[-1], bias=False, name='conv2')(nn.relu(y))


class _Fusion(nn.Module):
    """Adds a tap to what comes from below and doubles the size, in the names of DINOv2."""

    @nn.compact
    def __call__(self, x, tap=None):
        if tap is not None:
            x = x + _Unit(name='res_conv_unit1')(bilinear(tap, x.shape[1:3], False))
        x = _Unit(name='res_conv_unit2')(x)
        x = bilinear(x, tuple(2 * n for n in x.shape[1:3]), True)
        return _ConvModule(x.shape[-1], 1, name='project')(x)


class _Reassemble(nn.Module):
    """Four taps as maps of 4, 2, 1 and 1/2 times the grid, in the names of DINOv2."""

    channels: tuple

    @nn.compact
    def __call__(self, taps):
        out = []
        for i, (tap, channels) in enumerate(zip(taps, self.channels, strict=True)):
            x, d = joined([tap], True), tap[0].shape[-1]
            if tap[1] is not None:  # the class token is read out into each patch
                x = Conv(d, 1, name=f'readout_projects_{i}_0')(x)
                x = nn.gelu(x, approximate=False)
            x = _ConvModule(channels, 1, name=f'projects_{i}')(x)
            out.append(_resized(i, x, channels))
        return out


class _DepthHead(nn.Module):
    """The last layers of `DPT`, at twice the size."""

    @nn.compact
    def __call__(self, x):
        x = Conv(x.shape[-1] // 2, name='head_0')(x)
        x = bilinear(x, tuple(2 * n for n in x.shape[1:3]), True)
        x = nn.relu(Conv(32, name='head_2')(x))
        return Conv(1, 1, name='head_4')(x)


class DPT(nn.Module):
    """DINOv2's DPT head for depth: relu(output) + `min_depth`.

    References:
      DINOv2 `hub/depth/decode_heads.py: DPTHead`; Ranftl et al., arXiv 2103.13413
    """

    min_depth: float
    features: int = 256
    channels: tuple | None = None  # of the taps; default D/8, D/4, D/2, D

    @nn.compact
    def __call__(self, taps: Taps, size: tuple[int, int] | None = None, train: bool = False):
        del train
        d = taps[0][0].shape[-1]
        channels = self.channels or tuple(max(d // n, 1) for n in (8, 4, 2, 1))
        maps = _Reassemble(channels, name='reassemble_blocks')(taps)
        maps = [
            _ConvModule(self.features, bias=False, name=f'convs_{i}')(x) for i, x in enumerate(maps)
        ]
        x = _Fusion(name='fusion_blocks_0')(maps[3])
        for i in (1, 2, 3):
            x = _Fusion(name=f'fusion_blocks_{i}')(x, maps[3 - i])
        x = nn.relu(_ConvModule(self.features, name='project')(x))
        x = nn.relu(_DepthHead(name='conv_depth')(x)) + self.min_depth
        return (bilinear(x, size, False) if size else x)[..., 0]
