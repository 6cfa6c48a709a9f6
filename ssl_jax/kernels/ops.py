# SPDX-License-Identifier: Apache-2.0
"""Dense layers, GELU and LayerNorm with hand-written gradients.

Automatic differentiation keeps every intermediate of a norm or a GELU for the backward pass. On
CPU, writing an array once and reading it once costs more than recomputing it (the kernel zeroes
fresh pages, and no cache holds them). Each function here therefore keeps only its inputs and a few
numbers per row. Timings are in `experiments/bench`.

The form for a platform is chosen at lowering, not by the backend of the process: programs for TPU
are also compiled on machines without one. Pallas kernels are among them where `kernels.forms` says.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ssl_jax import sharding
from ssl_jax.kernels import forms
from ssl_jax.kernels.tpu import rows as tpu_rows


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def keep(x: jax.Array, name: str) -> jax.Array:
    """Names x as a residual that a policy in `models.blocks.REMAT` may keep for backward.

    The named value holds the bits of x as unsigned integers. JAX rounds a float that is both kept
    and used to its own precision; that is a copy, and a costly one unless XLA fuses it.
    """
    return _keep_forward(x, name)[0]


def _keep_forward(x, name):
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f'uint{8 * x.dtype.itemsize}'))
    return jax.lax.bitcast_convert_type(checkpoint_name(bits, name), x.dtype), None


keep.defvjp(_keep_forward, lambda name, _, grad: (grad,))


def lowered(special: dict[str, Callable], default: Callable, *args):
    """Calls special[platform], or `default`, with `args` for the platform of the lowering."""
    if not special:
        return default(*args)
    return jax.lax.platform_dependent(*args, **special, default=default)


@jax.custom_vjp
def dense(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """`x kernel + bias` for x (..., K), kernel (K, M) and bias (M,) of one dtype."""
    return x @ kernel + bias


def _dense_gradients(x, kernel, grad):
    rows = grad.reshape(-1, grad.shape[-1])  # (B * N, M)
    d_kernel = _transposed_product(x.reshape(-1, x.shape[-1]), rows)
    return grad @ kernel.T, d_kernel, sum_stored_rows(rows)


def sum_stored_rows(x: jax.Array) -> jax.Array:
    """`sum_rows` of an array that is in memory anyway; on TPU there is a kernel for it."""

    def kernel(x):
        return sharding.per_device(tpu_rows.sum_rows, 1)(x).sum(axis=0).astype(x.dtype)

    return lowered(_on_tpu(kernel, 'sum_rows', x), sum_rows, x)


def _on_tpu(kernel, op, x, *static):
    """{'tpu': kernel} if it is in use and supports x as the current mesh splits it."""

    def fits():
        rows = (x.shape[0] // sharding.num_devices(), *x.shape[1:])
        return sharding.only_rows(x.shape[0]) and tpu_rows.rows_fit(rows)

    return {'tpu': kernel} if forms.pick(op, x, static, {'pallas': fits}) == 'pallas' else {}


def _transposed_product(a, b):
    """a^T b for (R, K) and (R, M), the gradient of a dense layer's kernel.

    XLA on CPU is fastest if the left factor has the contracted axis last. Transposing the narrower
    factor costs less than the slower product. The barriers keep XLA from folding the transposes
    back into the product.
    """

    def narrow_first(a, b):
        barrier = jax.lax.optimization_barrier
        if a.shape[1] <= b.shape[1]:
            return barrier(a.T) @ b
        return barrier(barrier(b.T) @ a).T

    return jax.lax.platform_dependent(a, b, cpu=narrow_first, default=lambda a, b: a.T @ b)


dense.defvjp(
    lambda x, kernel, bias: (x @ kernel + bias, (x, kernel)),
    lambda residuals, grad: _dense_gradients(*residuals, grad),
)


def sum_rows(x: jax.Array) -> jax.Array:
    """Sums over all but the last axis, (..., M) -> (M,), accumulated in float32.

    On CPU this is a matrix product: XLA reduces a leading axis about ten times slower.
    """
    x = x.reshape(-1, x.shape[-1])

    def as_product(x):
        ones = jnp.ones((x.shape[0],), x.dtype)
        return jnp.matmul(ones, x, preferred_element_type=jnp.float32).astype(x.dtype)

    def as_sum(x):
        return x.sum(axis=0, dtype=jnp.float32).astype(x.dtype)

    return jax.lax.platform_dependent(x, cpu=as_product, default=as_sum)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, `x * Phi(x)` with the normal distribution function Phi (erf, not tanh).

    Computed in float32; the result has the dtype of `x`.

    References:
        Hendrycks and Gimpel, Gaussian error linear units, arXiv 1606.08415
    """
    y = x.astype(jnp.float32)
    return (y * _normal_cdf(y)).astype(x.dtype)


def _gelu_backward(x, grad):
    y = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * y * y) * (0.5 / jnp.pi) ** 0.5
    return (((_normal_cdf(y) + y * density) * grad.astype(jnp.float32)).astype(x.dtype),)


def _normal_cdf(x):
    return 0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


@jax.custom_vjp
def gelu_dense(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """`dense(gelu(x), kernel, bias)`; backward recomputes the activations from `x`."""
    return gelu(x) @ kernel + bias


def _gelu_dense_backward(residuals, grad):
    x, kernel = residuals
    d_gelu, d_kernel, d_bias = _dense_gradients(gelu(x), kernel, grad)
    return (*_gelu_backward(x, d_gelu), d_kernel, d_bias)


gelu_dense.defvjp(
    lambda x, kernel, bias: (gelu_dense(x, kernel, bias), (x, kernel)), _gelu_dense_backward
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float = 1e-6) -> jax.Array:
    """`(x - mean) / sqrt(var + eps) * scale + bias` for x (..., D), scale and bias (D,).

    Statistics are in float32, the result has the dtype of `x`. The variance is the mean squared
    deviation; `E[x^2] - E[x]^2` loses digits where the mean is large.
    """
    return _layer_norm_forward(x, scale, bias, eps)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm_and_input(x, scale, bias, eps: float = 1e-6) -> tuple[jax.Array, jax.Array]:
    """`(layer_norm(x, ...), x)`, the inputs of a residual branch and of its sum.

    One pass over the array then sums the gradients of both.
    """
    return _layer_norm_forward(x, scale, bias, eps, True)[0], x


def _layer_norm_forward(x, scale, bias, eps, and_input=False):
    def plain(x, scale, bias):
        y = x.astype(jnp.float32)
        mean = jnp.mean(y, axis=-1, keepdims=True)
        y = y - mean
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
        y = y * inverse * scale + bias
        return y.astype(x.dtype), mean[..., 0], inverse[..., 0]

    def kernel(x, scale, bias):
        norm = functools.partial(tpu_rows.layer_norm, eps=eps)
        y = sharding.per_device(norm, 1, 2)(x, scale[None], bias[None])
        unused = jnp.zeros(x.shape[:-1])  # the backward kernel recomputes the statistics
        return y, unused, unused

    special = _on_tpu(kernel, 'layer_norm', x, eps, and_input)
    y, mean, inverse = lowered(special, plain, x, scale, bias)
    return y, (x, scale, bias, mean, inverse)


def _layer_norm_backward(eps, residuals, grad, *other):
    """Gradients of x, scale and bias; `other`: further gradients of x, added to the first."""

    def plain(scale, mean, inverse, x, grad, *other):
        mean, inverse = mean[..., None], inverse[..., None]
        grad = grad.astype(jnp.float32)
        normal = (x.astype(jnp.float32) - mean) * inverse
        d_normal = grad * scale
        across = jnp.mean(d_normal, axis=-1, keepdims=True)
        along = jnp.mean(d_normal * normal, axis=-1, keepdims=True)
        d_x = (d_normal - across - normal * along) * inverse
        d_x = sum((x.astype(jnp.float32) for x in other), d_x)
        return d_x.astype(x.dtype), sum_rows(grad * normal), sum_rows(grad)

    def kernel(scale, mean, inverse, *arrays):
        del mean, inverse

        def norm(*args):
            return tpu_rows.layer_norm_gradient(*args[:-1], scale=args[-1], eps=eps)

        split = sharding.per_device(norm, len(arrays), 1)
        d_x, d_scale, d_bias = split(*arrays, scale[None])
        return d_x, d_scale.sum(axis=0), d_bias.sum(axis=0)

    x, scale, bias, mean, inverse = residuals
    args = scale, mean, inverse, x, grad, *other
    special = _on_tpu(kernel, 'layer_norm', x, eps, bool(other))
    d_x, d_scale, d_bias = lowered(special, plain, *args)
    return d_x, d_scale.astype(scale.dtype), d_bias.astype(bias.dtype)


def _layer_norm_and_input_forward(x, scale, bias, eps):
    y, residuals = _layer_norm_forward(x, scale, bias, eps, True)
    return (y, x), residuals


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)
layer_norm_and_input.defvjp(
    _layer_norm_and_input_forward,
    lambda eps, residuals, grads: _layer_norm_backward(eps, residuals, *grads),
)
