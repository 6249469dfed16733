"""The sizes of one block, and how many rows it is called with."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LatentAttention", "RoutedExperts", "Workload"]


@dataclass(frozen=True, kw_only=True)
class RoutedExperts:
    """The experts in place of a block's feed-forward; ``hidden`` is that of one of them.

    Attributes:
        experts: how many there are on this rank, E.
        top_k: how many of them each row is sent to. On one rank of several that share the
            experts it is the rows that come from all ranks, per row of this rank.
        shared: features between the Linears of the expert that gets every row; 0 for none.
        gpt_oss: matrices that lie as (E, K, N), biases, and gates that are clamped and
            interleaved with what they gate, as in gpt-oss.
    """

    experts: int
    top_k: int
    shared: int = 0
    gpt_oss: bool = False


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Queries, keys and values by way of few features, as in DeepSeek-V3.

    Attributes:
        q_rank: features that queries are made of.
        kv_rank: features that keys and values are made of.
        rope: features of a head with rotary positions, besides ``head_dim`` without; keys
            have them in common.
    """

    q_rank: int
    kv_rank: int
    rope: int


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One block and the number of rows that it is called with.

    Attributes:
        name: what users call it.
        source: where the sizes were published.
        m: rows, that is tokens on this rank.
        dim: features of the residual stream.
        heads: query heads on this rank.
        kv_heads: key and value heads on this rank.
        head_dim: features of one head.
        hidden: features between the feed-forward's Linears on this rank.
        sequence: tokens that attend to each other; all rows, if they are no multiple.
        vision: LayerNorm, biases, GELU and full attention, as in a vision transformer,
            instead of RMSNorm, SwiGLU and causal attention with rotary positions.
        fused_qkv: one Linear for q, k and v.
        qk_norm: RMSNorm on q and k.
        attention_bias: biases in the attention, which a vision transformer has anyway.
        moe: experts in place of the feed-forward, or None.
        latent: latent attention, or None.
        small: scaled down for a CPU.
    """

    name: str
    source: str
    m: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    sequence: int = 8192
    vision: bool = False
    fused_qkv: bool = False
    qk_norm: bool = False
    attention_bias: bool = False
    moe: RoutedExperts | None = None
    latent: LatentAttention | None = None
    small: bool = False

    @property
    def q(self) -> int:
        """Features of all queries on this rank."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Features of all keys on this rank, and of all values."""
        return self.kv_heads * self.head_dim

    @property
    def label(self) -> str:
        """Its name with its rows, as ``--workload`` takes it."""
        return f"{self.name}@{self.m}"
