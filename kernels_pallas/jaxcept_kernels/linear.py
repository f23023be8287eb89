"""Matrix products of activations with weights: a plain weight goes to XLA, a packed one to the CPU's own code.

A packed weight holds panels of 16 output features, zero-padded: [ceil(out / 16), in, 16]. The native product adds over
the input features in one order whatever the batch, so a row's result is the same bits alone and in company.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcept_kernels.library import native_available

PANEL = 16


def pack_weight(
    weight: jax.Array,  # [..., in, out]
) -> jax.Array:
    """The weight in panels for `linear`: [..., ceil(out / 16), in, 16], padded with zeros."""
    *several, features, out = weight.shape
    padded = jnp.pad(weight, (*[(0, 0)] * (weight.ndim - 1), (0, -out % PANEL)))
    return padded.reshape(*several, features, -1, PANEL).swapaxes(-3, -2)


def unpack_weight(
    packed: jax.Array,  # [..., ceil(out / 16), in, 16]
    out_features: int,
) -> jax.Array:
    """The weight that was packed: [..., in, out]."""
    *several, panels, features, _ = packed.shape
    whole: jax.Array = packed.swapaxes(-3, -2).reshape(*several, features, panels * PANEL)
    return whole[..., :out_features]


def linear(
    x: jax.Array,  # [tokens, in]
    weight: jax.Array,  # [in, out], or packed
    *,
    bias: jax.Array | None = None,  # [out]
    out_features: int | None = None,
) -> jax.Array:
    """x @ weight + bias in x's dtype: [tokens, out].

    `out_features` matters for packed weights alone: without it the product has all columns of the panels. Raises
    ValueError on shapes that do not fit.
    """
    check_shapes(x, weight, bias, out_features)
    if weight.ndim == 2:
        product = jnp.dot(x, weight)
        return product if bias is None else product + bias[None, :]
    out = weight.shape[0] * PANEL if out_features is None else out_features
    if x.dtype == weight.dtype == jnp.float32 and native_available():
        result = jax.ShapeDtypeStruct((x.shape[0], out), x.dtype)
        if bias is None:
            return jax.ffi.ffi_call("jaxcept_linear", result)(x, weight)
        return jax.ffi.ffi_call("jaxcept_linear_bias", result)(x, weight, bias)
    product = jnp.einsum("tk,nkp->tnp", x, weight).reshape(x.shape[0], -1)[:, :out]
    return product if bias is None else product + bias[None, :]


def lookup_rows(
    packed: jax.Array,  # [ceil(rows / 16), hidden, 16]: pack_weight(table.T)
    ids: jax.Array,  # [tokens] int32
) -> jax.Array:
    """Rows of a table of which the packed transpose is at hand (tied embeddings): [tokens, hidden].

    Ids past the last panel read its last row.
    """
    return packed.at[ids // PANEL, :, ids % PANEL].get(mode="clip")


def check_shapes(x: jax.Array, weight: jax.Array, bias: jax.Array | None, out_features: int | None) -> None:
    """Raises ValueError where the operands of `linear` do not fit."""
    if weight.ndim == 2:
        features, out = weight.shape
    elif weight.ndim == 3 and weight.shape[2] == PANEL:
        features, columns = weight.shape[1], weight.shape[0] * PANEL
        out = columns if out_features is None else out_features
        if not columns - PANEL < out <= columns:
            raise ValueError(f"linear: out_features={out} does not fit a packed weight of {columns} columns")
    else:
        raise ValueError(f"linear: weight of shape {weight.shape}: expected [in, out] or [panels, in, {PANEL}]")
    if x.ndim != 2 or x.shape[1] != features:
        raise ValueError(f"linear: x of shape {x.shape}: expected [tokens, {features}]")
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"linear: bias of shape {bias.shape}: expected [{out}]")
