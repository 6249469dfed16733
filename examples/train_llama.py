"""Train a small Llama on this repository's own text, tuned by fp8tune.

::

    python examples/train_llama.py

One sees the loss fall, and fp8tune's table of what it timed and kept: small layers (wk,
wv) do not pay for the casts, large ones (w1, w2, w3) do. A second table compares whole
training steps with nothing converted, everything converted, and the plan. The next run
finds the plan in the cache file and times nothing.

With a GPU the model is bfloat16 and the recipe "rowwise" float8. Without one the model
is float32 and the recipe "bf16", which has winners and losers on a CPU with AMX or
AVX512-bf16 too. A CPU that is busy with something else gives no useful timings.
"""

import argparse
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fp8tune
from fp8tune import AutoFloat8, TuneConfig

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 256  # bytes
ROPE_BASE = 10000.0
ROUNDS = 40  # training steps per variant in the comparison
WARMUP_ROUNDS = 3  # the first of them compile


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model and of one batch."""

    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    batch: int
    length: int
    learning_rate: float


CPU_SIZES = Sizes(256, 1024, 4, 8, 2, batch=2, length=64, learning_rate=1e-3)
GPU_SIZES = Sizes(4096, 14336, 4, 32, 8, batch=2, length=2048, learning_rate=1e-4)


def rope_angles(length: int, head_dim: int) -> Tensor:
    """Cosines and sines of the rotary embedding, (2, length, head_dim / 2)."""
    steps = torch.arange(0, head_dim, 2) / head_dim
    angles = torch.outer(torch.arange(length), ROPE_BASE**-steps)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + head_dim / 2]) of (..., length, head_dim)."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Attention(nn.Module):
    """Causal attention whose query heads share fewer key and value heads."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.head_dim = sizes.dim // sizes.heads
        kv_dim = sizes.kv_heads * self.head_dim
        self.wq = nn.Linear(sizes.dim, sizes.dim, bias=False)
        self.wk = nn.Linear(sizes.dim, kv_dim, bias=False)
        self.wv = nn.Linear(sizes.dim, kv_dim, bias=False)
        self.wo = nn.Linear(sizes.dim, sizes.dim, bias=False)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """(batch, length, dim) -> the same shape."""
        q, k, v = (self._heads(w(x)) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(q, rope), rotate(k, rope)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.w1 = nn.Linear(sizes.dim, sizes.hidden, bias=False)
        self.w2 = nn.Linear(sizes.hidden, sizes.dim, bias=False)
        self.w3 = nn.Linear(sizes.dim, sizes.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, dim) -> the same shape."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(sizes.dim)
        self.attention = Attention(sizes)
        self.ffn_norm = nn.RMSNorm(sizes.dim)
        self.feed_forward = FeedForward(sizes)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """(batch, length, dim) -> the same shape."""
        x = x + self.attention(self.attention_norm(x), rope)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, sizes.dim)
        self.layers = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.dim)
        self.output = nn.Linear(sizes.dim, VOCABULARY, bias=False)
        rope = rope_angles(sizes.length, sizes.dim // sizes.heads)
        self.register_buffer("rope", rope, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, length) -> (batch, length, 256)."""
        x = self.tok_embeddings(tokens)
        for block in self.layers:
            x = block(x, self.rope)
        return self.output(self.norm(x))


def compile_blocks(model: nn.Module) -> None:
    """Compile each block in place; they share their code, so one compilation serves."""
    for block in model.layers:
        block.compile()


def load_text() -> Tensor:
    """The repository's documentation and source as one row of bytes."""
    patterns = ("README.md", "docs/**/*.md", "fp8tune/*.py")
    paths = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    text = bytearray(b"\n".join(path.read_bytes() for path in paths))
    return torch.frombuffer(text, dtype=torch.uint8).long()


class Trainer:
    """AdamW on random windows of a text."""

    def __init__(self, model: nn.Module, sizes: Sizes, device: str) -> None:
        self.model, self.sizes = model, sizes
        self.text = load_text().to(device)
        self.window = torch.arange(sizes.length + 1, device=device)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.learning_rate)

    def step(self) -> float:
        """One training step; its loss in nats per byte, read last to wait for a GPU."""
        last = len(self.text) - len(self.window)
        start = torch.randint(last, (self.sizes.batch, 1), device=self.text.device)
        tokens = self.text[start + self.window]
        logits = self.model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def train(self, steps: int) -> None:
        """Train, and print the mean loss ten times on the way."""
        every = max(1, steps // 10)
        losses = deque[float](maxlen=every)
        for step in range(1, steps + 1):
            losses.append(self.step())
            if step % every == 0:
                print(f"step {step:4}  loss {mean(losses):.2f}")


@contextmanager
def all_converted(model: nn.Module, recipe: fp8tune.Recipe) -> Iterator[None]:
    """Inside the block every Linear runs with the recipe, as without a tuner."""
    plain = [module for module in model.modules() if type(module) is nn.Linear]
    for linear in plain:
        recipe.convert(linear)
    yield
    for linear in plain:
        recipe.revert(linear)


def timed_step(trainer: Trainer, variant: AbstractContextManager[None]) -> float:
    """Seconds of one training step of a variant."""
    with variant:
        start = time.perf_counter()
        trainer.step()
        return time.perf_counter() - start


def compare(auto: AutoFloat8, trainer: Trainer, recipe: fp8tune.Recipe) -> None:
    """Print the tokens per second of whole training steps, taken in turns."""
    variants: dict[str, Callable[[], AbstractContextManager[None]]] = {
        f"all {recipe.reference}": auto.reference,
        f"all {recipe.name}": lambda: all_converted(auto.module, recipe),
        "fp8tune's plan": nullcontext,
    }
    rounds = [
        [timed_step(trainer, variant()) for variant in variants.values()]
        for _ in range(WARMUP_ROUNDS + ROUNDS)
    ]
    seconds = [median(column) for column in zip(*rounds[WARMUP_ROUNDS:], strict=True)]
    tokens = trainer.sizes.batch * trainer.sizes.length
    print(f"\n{'training steps':<20}{'tokens/s':>10}{'ratio':>8}")
    for name, value in zip(variants, seconds, strict=True):
        print(f"{name:<20}{tokens / value:>10,.0f}{seconds[0] / value:>8.2f}")


def run(arguments: argparse.Namespace) -> None:
    """Train with fp8tune, then compare."""
    device, name = arguments.device, arguments.recipe
    recipe = fp8tune.get_recipe(name, device)
    sizes = GPU_SIZES if device == "cuda" else CPU_SIZES
    dtype = torch.float32 if name == "bf16" else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(device):
        model = Llama(sizes).to(dtype)
    auto = AutoFloat8(
        model,
        recipe=name,
        compile=compile_blocks,
        cache=arguments.cache,
        # Time the layers that the recipe's table of small K and N would leave out.
        config=TuneConfig(static_filter="divisible"),
    )
    trainer = Trainer(auto, sizes, device)
    trainer.train(arguments.steps)
    auto.freeze()  # only needed after fewer steps than the tuner wants to see
    compare(auto, trainer, recipe)


def parse_arguments() -> argparse.Namespace:
    """What the command line says."""
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(description="Train a small Llama with fp8tune.")
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--recipe", help="default: rowwise on a GPU, else bf16")
    parser.add_argument("--steps", type=int, default=100, help="training steps")
    parser.add_argument("--cache", default=".fp8tune/demo.json", help="a JSON file")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"argument --steps: {arguments.steps} is not 1 or more")
    if arguments.recipe is None:
        arguments.recipe = "rowwise" if arguments.device == "cuda" else "bf16"
    return arguments


def main() -> int:
    """Run the demo; returns the exit code."""
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        run(arguments)
    except fp8tune.UnknownRecipeError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
