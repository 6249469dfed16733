"""Train a small Llama on this repository's own text, tuned by fp8tune.

Run ``python examples/train_llama.py``. One sees fp8tune's table of what it timed and
kept, the loss as it falls, and a second table: tokens per second with nothing converted,
everything converted, and the plan. The next run finds the plan in the cache file and
times nothing.

With a GPU the model is bfloat16 and the recipe "rowwise" float8. Without one the model
is float32 and the recipe "bf16", which has winners (w1, w2, w3) and losers (wk, wv) on
a CPU with AMX, if nothing else keeps it busy.

On several processes: ``torchrun --nproc-per-node 2 examples/train_llama.py --tp 2``, or
``--fsdp 2``, ``--dp 2``. Only the first prints; the loss is that of its own batches.
"""

import argparse
import logging
import sys
import time
from contextlib import nullcontext, redirect_stdout
from copy import deepcopy
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import torch
from parallel import Processes, add_arguments
from torch import Tensor, nn
from torch.nn import functional as F

import fp8tune
from fp8tune import AutoFloat8, Plan, Recipe

VOCABULARY = 256  # bytes
WARMUP_ROUNDS = 3  # of the comparison: they compile and are not counted


class Sizes(NamedTuple):
    """Sizes of the model and of one batch."""

    dim: int
    hidden: int
    layers: int
    head_dim: int
    kv_heads: int
    batch: int
    length: int


CPU_SIZES = Sizes(256, 1024, 4, 32, 2, batch=2, length=64)
GPU_SIZES = Sizes(4096, 14336, 4, 128, 8, batch=2, length=2048)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + head_dim / 2]) of (..., length, head_dim)."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Attention(nn.Module):
    """Causal attention whose query heads share fewer key and value heads."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = (-1, sizes.head_dim)
        kv_dim = sizes.kv_heads * sizes.head_dim
        self.wq = nn.Linear(sizes.dim, sizes.dim, bias=False)
        self.wk = nn.Linear(sizes.dim, kv_dim, bias=False)
        self.wv = nn.Linear(sizes.dim, kv_dim, bias=False)
        self.wo = nn.Linear(sizes.dim, sizes.dim, bias=False)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """(batch, length, dim) -> the same shape."""
        heads = (w(x).unflatten(-1, self.heads) for w in (self.wq, self.wk, self.wv))
        q, k, v = (head.transpose(1, 2) for head in heads)
        q, k = rotate(q, rope), rotate(k, rope)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(y.transpose(1, 2).flatten(2))


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
        exponents = torch.arange(0, sizes.head_dim, 2) / sizes.head_dim
        angles = torch.outer(torch.arange(sizes.length), 10_000.0**-exponents)
        rope = torch.stack((angles.cos(), angles.sin()))
        self.register_buffer("rope", rope, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, length) -> (batch, length, 256)."""
        x = self.tok_embeddings(tokens)
        for block in self.layers:
            x = block(x, self.rope)
        return self.output(self.norm(x))


def compile_blocks(model: nn.Module) -> None:
    """Compile each block in place; they share their code, so one compilation serves."""
    for block in model.get_submodule("layers").children():
        block.compile()


def load_text() -> Tensor:
    """The repository's documentation and source as one row of bytes."""
    root = Path(__file__).resolve().parent.parent
    patterns = ("README.md", "docs/**/*.md", "fp8tune/*.py")
    paths = [path for pattern in patterns for path in sorted(root.glob(pattern))]
    text = bytearray(b"\n".join(path.read_bytes() for path in paths))
    return torch.frombuffer(text, dtype=torch.uint8).long()


class Trainer:
    """AdamW on random windows of a text."""

    def __init__(self, model: nn.Module, sizes: Sizes, device: str) -> None:
        self.model, self.batch, self.device = model, sizes.batch, device
        self.windows = load_text().unfold(0, sizes.length + 1, 1)
        self.losses: list[float] = []  # nats per byte, one per step
        self.seconds: list[float] = []
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)

    def step(self) -> None:
        """One training step."""
        begin = time.perf_counter()
        rows = torch.randint(len(self.windows), (self.batch,))
        tokens = self.windows[rows].to(self.device)
        logits = self.model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())  # waits for a GPU
        self.seconds.append(time.perf_counter() - begin)

    def train(self, steps: int) -> None:
        """Train, and print the mean loss ten times on the way."""
        every = max(1, steps // 10)
        for step in range(1, steps + 1):
            self.step()
            if step % every == 0:
                print(f"step {step:4}  loss {mean(self.losses[-every:]):.2f}")


def build_variants(
    bare: Llama, plan: Plan, recipe: Recipe, processes: Processes
) -> dict[str, nn.Module]:
    """Nothing converted, everything converted, and the plan; their blocks compiled."""
    converted, planned = deepcopy(bare), deepcopy(bare)
    for module in converted.modules():
        if isinstance(module, nn.Linear):
            recipe.convert(module)
    plan.apply(planned)
    models: list[nn.Module] = []
    for model in (bare, converted, planned):
        processes.shard(model)
        compile_blocks(model)
        models.append(processes.replicate(model))
    names = (f"all {recipe.reference}", f"all {recipe.name}", "fp8tune's plan")
    return dict(zip(names, models, strict=True))


def compare(
    models: dict[str, nn.Module],
    sizes: Sizes,
    device: str,
    batches: int,
    rounds: int,
) -> None:
    """Print the tokens per second of whole training steps, taken in turns."""
    trainers = [Trainer(model, sizes, device) for model in models.values()]
    for trainer in trainers * (WARMUP_ROUNDS + rounds):
        trainer.step()
    seconds = [median(x.seconds[WARMUP_ROUNDS:]) for x in trainers]
    print(f"\n{'training steps':<20}{'tokens/s':>10}{'ratio':>8}")
    for name, value in zip(models, seconds, strict=True):
        tokens = batches * sizes.batch * sizes.length / value
        print(f"{name:<20}{tokens:>10,.0f}{seconds[0] / value:>8.2f}")


def run(
    arguments: argparse.Namespace, recipe: Recipe, sizes: Sizes, processes: Processes
) -> None:
    """Train with fp8tune, then compare."""
    device = arguments.device
    torch.manual_seed(0)
    with torch.device(device):
        model = Llama(sizes).to(getattr(torch, recipe.reference))
    bare = deepcopy(model)
    processes.shard(model)
    # Also time what the recipe's table of small K and N, or care for stability, would
    # leave out.
    # A trial of whole plans needs ten rounds of eight, and is to end before training.
    steps = arguments.steps
    config = fp8tune.TuneConfig(
        static_filter=fp8tune.StaticFilter.DIVISIBLE,
        include_output_layer=True,
        trial_steps=min(400, steps * 4 // 5) if steps >= 100 else 0,
    )
    auto = AutoFloat8(
        model, recipe, compile=compile_blocks, cache=arguments.cache, config=config
    )
    trained = processes.replicate(auto)
    processes.seed_batches()
    Trainer(trained, sizes, device).train(steps)
    plan = auto.freeze()  # is frozen already, unless there were hardly any steps
    if not arguments.no_compare:
        variants = build_variants(bare, plan, recipe, processes)
        compare(variants, sizes, device, processes.batches, arguments.rounds)


def parse_arguments() -> tuple[argparse.Namespace, Sizes, Processes]:
    """What the command line says."""
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(description="Train a small Llama with fp8tune.")
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--recipe", help="default: rowwise on a GPU, else bf16")
    parser.add_argument("--steps", type=int, default=100, help="training steps")
    parser.add_argument("--cache", default=".fp8tune/demo.json", help="a JSON file")
    parser.add_argument("--rounds", type=int, default=37, help="steps of each compared")
    parser.add_argument("--no-compare", action="store_true", help="only train")
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"argument --steps: {arguments.steps} is below 1")
    if arguments.rounds < 1:
        parser.error(f"argument --rounds: {arguments.rounds} is below 1")
    sizes = GPU_SIZES if arguments.device == "cuda" else CPU_SIZES
    try:
        return arguments, sizes, Processes(arguments, sizes.kv_heads)
    except ValueError as error:
        parser.error(str(error))


def main() -> int:
    """Run the demo; returns the exit code."""
    arguments, sizes, processes = parse_arguments()
    device = arguments.device
    name = arguments.recipe or ("rowwise" if device == "cuda" else "bf16")
    if processes.first:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    silence = nullcontext() if processes.first else redirect_stdout(None)
    try:
        recipe = fp8tune.get_recipe(name, device)
        with silence, processes:
            run(arguments, recipe, sizes, processes)
    except fp8tune.UnknownRecipeError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
