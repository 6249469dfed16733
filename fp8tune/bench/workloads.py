"""What the benchmark runs: one block of a published model, by name.

Sizes are those on one rank. A block under tensor or expert parallelism has its local sizes
and runs without communication, so that one device is enough; what overlaps with
communication in training is not in its time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fp8tune.bench.sizes import LatentAttention, RoutedExperts, Workload
from fp8tune.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["WORKLOADS", "find_workloads", "scaled_down"]

# What a block is scaled down to, as far as its heads allow, and by how much its rows are.
_SMALL_DIM = 512
_SMALL_HEAD_DIM = 16
_ROWS_DIVISOR = 64


_LLAMA_3 = "The Llama 3 Herd of Models, arXiv 2407.21783, table 3"


def _rows(workload: Workload, *rows: int) -> list[Workload]:
    return [replace(workload, m=m) for m in rows]


def _llama(name: str, dim: int, heads: int, hidden: int, tp: int = 1) -> Workload:
    """A block of Llama 3, whose heads have 128 features and 8 of which hold keys."""
    return Workload(
        name=name,
        source=_LLAMA_3,
        m=8192,
        dim=dim,
        heads=heads // tp,
        kv_heads=8 // tp,
        head_dim=128,
        hidden=hidden // tp,
    )


WORKLOADS: list[Workload] = [
    *_rows(_llama("llama3-8b", 4096, 32, 14336), 2048, 8192, 16384),
    *_rows(_llama("llama3-70b-tp8", 8192, 64, 28672, tp=8), 8192, 16384),
    _llama("llama3-405b-tp8", 16384, 128, 53248, tp=8),
    Workload(
        name="qwen3-14b",
        source="config.json of Qwen/Qwen3-14B",
        m=8192,
        dim=5120,
        heads=40,
        kv_heads=8,
        head_dim=128,
        hidden=17408,
        qk_norm=True,
    ),
    Workload(
        name="llama3.2-1b",
        source="config.json of meta-llama/Llama-3.2-1B",
        m=8192,
        dim=2048,
        heads=32,
        kv_heads=8,
        head_dim=64,
        hidden=8192,
    ),
    Workload(
        name="vit-l",
        source="An Image is Worth 16x16 Words, arXiv 2010.11929, table 1; 27 images of "
        "196 patches and a class token",
        m=27 * 197,
        dim=1024,
        heads=16,
        kv_heads=16,
        head_dim=64,
        hidden=4096,
        sequence=197,
        vision=True,
        fused_qkv=True,
    ),
    Workload(
        name="torchtitan-debug",
        source="torchtitan 0.3, models/llama3, llama3_debugmodel: 8 sequences of 2048",
        m=8 * 2048,
        dim=256,
        heads=16,
        kv_heads=16,
        head_dim=16,
        hidden=768,
        sequence=2048,
        fused_qkv=True,
    ),
    Workload(
        name="mixtral-8x7b",
        source="config.json of mistralai/Mixtral-8x7B-v0.1",
        m=8192,
        dim=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        hidden=14336,
        moe=RoutedExperts(experts=8, top_k=2),
    ),
    Workload(
        name="qwen3-30b-a3b",
        source="config.json of Qwen/Qwen3-30B-A3B",
        m=8192,
        dim=2048,
        heads=32,
        kv_heads=4,
        head_dim=128,
        hidden=768,
        qk_norm=True,
        moe=RoutedExperts(experts=128, top_k=8),
    ),
    Workload(
        name="deepseek-v3-ep8",
        source="config.json of deepseek-ai/DeepSeek-V3; 32 of the 256 experts, and as many "
        "rows as eight ranks send to each eighth of them",
        m=8192,
        dim=7168,
        heads=128,
        kv_heads=128,
        head_dim=128,
        hidden=2048,
        moe=RoutedExperts(experts=32, top_k=8, shared=2048),
        latent=LatentAttention(q_rank=1536, kv_rank=512, rope=64),
    ),
    Workload(
        name="gpt-oss-20b",
        source="config.json of openai/gpt-oss-20b",
        m=8192,
        dim=2880,
        heads=64,
        kv_heads=8,
        head_dim=64,
        hidden=2880,
        attention_bias=True,
        moe=RoutedExperts(experts=32, top_k=4, gpt_oss=True),
    ),
]


def find_workloads(names: Sequence[str]) -> list[Workload]:
    """The workloads of these names, all if there are none.

    Args:
        names: such as "llama3-8b" (with each number of rows) or "llama3-8b@2048".

    Raises:
        ConfigError: there is no workload of that name; the message lists them.
    """
    known = {x.name: [y for y in WORKLOADS if y.name == x.name] for x in WORKLOADS}
    known |= {x.label: [x] for x in WORKLOADS}
    unknown = [name for name in names if name not in known]
    if unknown:
        listed = ", ".join(dict.fromkeys(x.name for x in WORKLOADS))
        raise ConfigError(
            f"no workload {unknown[0]!r}; choose from {listed}, with rows as in "
            f"{WORKLOADS[0].label}, or give --m for other rows"
        )
    return [x for name in names for x in known[name]] or WORKLOADS


def scaled_down(workload: Workload) -> Workload:
    """The same block with 256 to 2048 features, for a CPU; rows are divided by 64.

    All features are divided by the same number, so their proportions stay; a head keeps
    at least 16, and as many with rotary positions, since float8 needs multiples of that.
    There are as many experts as before, and each row goes to as many of them.
    """
    divisor = 1
    while (
        workload.dim >= 2 * divisor * _SMALL_DIM
        and workload.head_dim >= 2 * divisor * _SMALL_HEAD_DIM
    ):
        divisor *= 2
    moe, latent = workload.moe, workload.latent
    return replace(
        workload,
        m=max(1, workload.m // _ROWS_DIVISOR),
        dim=workload.dim // divisor,
        head_dim=workload.head_dim // divisor,
        hidden=workload.hidden // divisor,
        moe=moe and replace(moe, shared=moe.shared // divisor),
        latent=latent and _smaller(latent, divisor),
        small=True,
    )


def _smaller(latent: LatentAttention, divisor: int) -> LatentAttention:
    return LatentAttention(
        q_rank=latent.q_rank // divisor,
        kv_rank=latent.kv_rank // divisor,
        rope=max(latent.rope // divisor, _SMALL_HEAD_DIM),
    )
