# SPDX-License-Identifier: Apache-2.0
"""Dense layers, GELU and LayerNorm of the networks, with gradients made for speed.

Automatic differentiation keeps every intermediate of a norm or a GELU for the backward pass. On
CPU, memory that is written once and read once costs more than computing its content again (the
kernel zeroes fresh pages, and no cache holds them), so each function here keeps its inputs and a
few numbers per row, and the backward pass starts from those. `experiments/bench` has the timings.

The choice between a form for CPU and one for accelerators is made when a program is lowered, not by
the backend of the process: programs for TPU are also compiled on machines that have none.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ssl_jax import sharding
from ssl_jax.kernels.tpu import rows as tpu_rows


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def keep(x, name):
    """x, of which `layers.REMAT` may say by this name that it is kept for the backward pass.

    It is kept as whole numbers of the same bits: floats that are kept and used besides JAX rounds
    to their own precision, which is nothing but a copy, and costs as much where no kernel of XLA's
    is there to do it in passing.
    """
    return _keep_forward(x, name)[0]


def _keep_forward(x, name):
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f'uint{8 * x.dtype.itemsize}'))
    return jax.lax.bitcast_convert_type(checkpoint_name(bits, name), x.dtype), None


keep.defvjp(_keep_forward, lambda name, _, grad: (grad,))


def lowered(forms, default, *args):
    """forms[platform](*args) where there is one for the platform that a program is lowered for."""
    return jax.lax.platform_dependent(*args, **forms, default=default) if forms else default(*args)


@jax.custom_vjp
def dense(x, kernel, bias):
    """``x kernel + bias``.

    Args:
        x: (..., K) array.
        kernel: (K, M) array of the dtype of ``x``.
        bias: (M,) array of the dtype of ``x``.

    Returns:
        (..., M) array of the dtype of ``x``.
    """
    return x @ kernel + bias


def _dense_forward(x, kernel, bias):
    return x @ kernel + bias, (x, kernel)


def _dense_backward(residuals, grad):
    x, kernel = residuals
    return _dense_gradients(x, kernel, grad)


def _dense_gradients(x, kernel, grad):
    rows = grad.reshape(-1, grad.shape[-1])  # (B * N, M)
    d_kernel = _transposed_product(x.reshape(-1, x.shape[-1]), rows)
    return grad @ kernel.T, d_kernel, _sum_of_stored_rows(rows)


def _sum_of_stored_rows(x):
    """`sum_rows` of an array that is in memory anyway: by a kernel on TPU."""

    def kernel(x):
        return sharding.per_device(tpu_rows.sum_rows, 1)(x).sum(axis=0).astype(x.dtype)

    return lowered({'tpu': kernel} if _kernels_take(x) else {}, sum_rows, x)


def _kernels_take(x):
    """Whether the TPU kernels for rows take x as the current mesh splits it."""
    rows = (x.shape[0] // sharding.num_devices(), *x.shape[1:])
    return sharding.only_rows(x.shape[0]) and tpu_rows.rows_fit(rows)


def _transposed_product(a, b):
    """a^T b for (R, K) and (R, M), the gradient of a dense layer's kernel.

    XLA on CPU is fastest on products whose left factor has the summed axis last. Transposing the
    narrower factor by itself takes less than what the other forms lose; the barriers keep XLA from
    folding the transposes back into the product.
    """

    def narrow_first(a, b):
        apart = jax.lax.optimization_barrier
        if a.shape[1] <= b.shape[1]:
            return apart(a.T) @ b
        return apart(apart(b.T) @ a).T

    return jax.lax.platform_dependent(a, b, cpu=narrow_first, default=lambda a, b: a.T @ b)


dense.defvjp(_dense_forward, _dense_backward)


def sum_rows(x):
    """(..., M) -> (M,), accumulated in float32.

    XLA on CPU adds up a leading axis about ten times slower than a matrix product does.
    """
    x = x.reshape(-1, x.shape[-1])

    def as_product(x):
        ones = jnp.ones((x.shape[0],), x.dtype)
        return jnp.matmul(ones, x, preferred_element_type=jnp.float32).astype(x.dtype)

    def as_sum(x):
        return x.sum(axis=0, dtype=jnp.float32).astype(x.dtype)

    return jax.lax.platform_dependent(x, cpu=as_product, default=as_sum)


@jax.custom_vjp
def gelu(x):
    """Exact GELU, ``x * Phi(x)`` with the normal distribution function Phi (erf, not tanh).

    Args:
        x: array of any shape.

    Returns:
        Array of the shape and dtype of ``x``; computed in float32.

    References:
        Hendrycks and Gimpel, `Gaussian error linear units <https://arxiv.org/abs/1606.08415>`_,
        2016
    """
    y = x.astype(jnp.float32)
    return (y * _normal_cdf(y)).astype(x.dtype)


def _gelu_forward(x):
    return gelu(x), x


def _gelu_backward(x, grad):
    y = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * y * y) * (0.5 / jnp.pi) ** 0.5
    return (((_normal_cdf(y) + y * density) * grad.astype(jnp.float32)).astype(x.dtype),)


def _normal_cdf(x):
    return 0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5)


gelu.defvjp(_gelu_forward, _gelu_backward)


@jax.custom_vjp
def gelu_dense(x, kernel, bias):
    """``dense(gelu(x), kernel, bias)``, for which only ``x`` is kept, not the activations.

    Args:
        x: (..., K) array.
        kernel: (K, M) array of the dtype of ``x``.
        bias: (M,) array of the dtype of ``x``.

    Returns:
        (..., M) array of the dtype of ``x``.
    """
    return gelu(x) @ kernel + bias


def _gelu_dense_forward(x, kernel, bias):
    return gelu_dense(x, kernel, bias), (x, kernel)


def _gelu_dense_backward(residuals, grad):
    x, kernel = residuals
    d_gelu, d_kernel, d_bias = _dense_gradients(gelu(x), kernel, grad)
    return (*_gelu_backward(x, d_gelu), d_kernel, d_bias)


gelu_dense.defvjp(_gelu_dense_forward, _gelu_dense_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x, scale, bias, eps=1e-6):
    """``(x - mean) / sqrt(var + eps) * scale + bias`` over the last axis.

    Statistics are in float32 and the variance is the mean of squared deviations, not
    ``E[x^2] - E[x]^2``, which loses digits where the mean is large.

    Args:
        x: (..., D) array.
        scale: (D,) array.
        bias: (D,) array.
        eps: added to the variance.

    Returns:
        Array of the shape and dtype of ``x``.
    """
    return _layer_norm_forward(x, scale, bias, eps)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm_and_input(x, scale, bias, eps=1e-6):
    """``(layer_norm(x, ...), x)``: for a residual branch and what it is added to.

    The gradients of both then come together in one pass over the array.
    """
    return _layer_norm_forward(x, scale, bias, eps)[0], x


def _layer_norm_forward(x, scale, bias, eps):
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
        unused = jnp.zeros(x.shape[:-1])  # the kernel of the backward pass finds them itself
        return y, unused, unused

    forms = {'tpu': kernel} if _kernels_take(x) else {}
    y, mean, inverse = lowered(forms, plain, x, scale, bias)
    return y, (x, scale, bias, mean, inverse)


def _layer_norm_backward(eps, residuals, grad, *other):
    """`other`: a gradient that x gets from elsewhere too, or nothing."""

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
    forms = {'tpu': kernel} if _kernels_take(x) else {}
    d_x, d_scale, d_bias = lowered(forms, plain, scale, mean, inverse, x, grad, *other)
    return d_x, d_scale.astype(scale.dtype), d_bias.astype(bias.dtype)


def _layer_norm_and_input_forward(x, scale, bias, eps):
    y, residuals = _layer_norm_forward(x, scale, bias, eps)
    return (y, x), residuals


def _layer_norm_and_input_backward(eps, residuals, grads):
    return _layer_norm_backward(eps, residuals, *grads)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)
layer_norm_and_input.defvjp(_layer_norm_and_input_forward, _layer_norm_and_input_backward)
