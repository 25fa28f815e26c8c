"""Scaled dot-product attention of any number of dimensions; onnxscript's library has four alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from evm_deploy.errors import UsageError


def attention_translations(opset: int) -> dict[Any, Callable[..., Any]]:
    """Return translations for torch.onnx.export of torch's scaled_dot_product_attention.

    before:  Attention(%query, %key, %value, %mask)             of (.., L, E), (.., S, E), (.., S, F) -> (.., L, F)
    after:   MatMul(Softmax(MatMul(%query * scale, transposed %key) + %mask), %value)

    Attention of four dimensions is left to onnxscript. Masks are added, or true where a key takes part; is_causal needs
    known L and S. Raises UsageError for grouped queries of other than four dimensions.
    """
    import torch
    from onnxscript import ir, values
    from onnxscript.function_libs.torch_lib.ops import nn

    op = values.Opset("", opset)

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        ranks = {len(each.shape) for each in (query, key, value)}
        if ranks == {4}:
            return nn.aten_scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
            )
        if enable_gqa:
            raise UsageError(
                f"attention with enable_gqa of {max(ranks)} dimensions cannot be exported",
                "reshape queries, keys and values to (batch, heads, tokens, channels)",
            )
        swapped = list(range(len(key.shape)))
        swapped[-2:] = swapped[:-3:-1]
        factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        scores = op.MatMul(op.Mul(query, op.CastLike(factor, query)), op.Transpose(key, perm=swapped))
        if is_causal:
            later = np.triu(np.full((query.shape[-2], key.shape[-2]), -np.inf, np.float32), 1)
            attn_mask = op.Constant(value=ir.tensor(later))
        elif attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL:
            attn_mask = op.Where(attn_mask, op.CastLike(0.0, query), op.CastLike(-math.inf, query))
        if attn_mask is not None:
            scores = op.Add(scores, op.CastLike(attn_mask, query))
        return op.MatMul(op.Softmax(scores, axis=-1), value)

    return {torch.ops.aten.scaled_dot_product_attention.default: attention}
