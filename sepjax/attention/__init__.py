"""The attention op: `separator_attention` over a layout, and `dense_attention`, the baseline it is measured against."""

from sepjax.attention.dense import dense_attention
from sepjax.attention.op import separator_attention

__all__ = ["dense_attention", "separator_attention"]
