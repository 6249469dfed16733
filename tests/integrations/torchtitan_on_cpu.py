"""Both runs of examples/with_torchtitan.py in torchtitan's own Trainer, on a CPU.

Run in a process of its own: ``python -m tests.integrations.torchtitan_on_cpu FOLDER``. It leaves plan.json
and runs.json, which says after each step what each Linear is.

torchtitan takes what it trains on from torch.accelerator and calls that device's module;
so that it runs without a GPU, it is told of a device "cpu" whose module is torch.cpu with
the memory statistics that torch.cpu lacks. FlexAttention has no backward on CPUs, so
torchtitan's attention without masks stands in for it. Nothing else is changed: model,
FSDP2, activation checkpointing, loss, optimizer and steps are torchtitan's.
"""

# torchtitan asks for its device when it is imported, which must come after.
# ruff: noqa: PLC0415

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")

import torch
from torch import nn

from tests.conftest import ScriptedClock
from tests.helpers import widening

STEPS = 5
ROOT = Path(__file__).resolve().parents[2]


class CpuModule:
    """torch.cpu, with what else torchtitan asks of a device's module."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def get_device_name(self, device: object) -> str:
        return "cpu"

    def get_device_properties(self, device: object) -> SimpleNamespace:
        return SimpleNamespace(total_memory=2**33)

    def memory_stats(self, device: object) -> dict[str, int]:
        return {}

    def reset_peak_memory_stats(self) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0


def train_on_cpu() -> None:
    from torchtitan.tools import utils

    utils.device_type, utils.device_module = "cpu", CpuModule()


def script_the_clock() -> None:
    import fp8tune.timing.clocks

    fp8tune.timing.clocks.CpuClock = lambda *_: ScriptedClock(widening)


def write_text_and_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["?", "<s>", "</s>", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    (folder / "text").mkdir()
    line = json.dumps({"text": " ".join("abcdefgh"[i * i % 8] for i in range(60))})
    (folder / "text" / "text.jsonl").write_text("\n".join([line] * 50))


def small(config: Any, folder: Path) -> Any:
    """The same run with two blocks and short rows, on a text of our own."""
    from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
    from torchtitan.models.common.attention import ScaledDotProductAttention

    model = config.model_spec.model
    model.layers = model.layers[:2]
    for layer in model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    config.training.steps = STEPS
    config.training.seq_len = 32
    config.training.local_batch_size = 2
    config.training.disable_cuda_graphs = True
    config.checkpoint.enable = False
    config.hf_assets_path = str(folder)
    config.dump_folder = str(folder / "outputs")
    config.dataloader = HuggingFaceTextDataLoader.Config(
        dataset="c4_test", dataset_path=str(folder / "text")
    )
    return config


def run(config: Any) -> list[dict[str, str]]:
    trainer = config.build()
    batches = trainer.batch_generator(trainer.dataloader)
    kinds: list[dict[str, str]] = []
    # Not trainer.train(), which after the first step calls a function of
    # torch.distributed that torch 2.13 does not have.
    for _ in range(STEPS):
        trainer.step += 1
        trainer.train_step(batches)
        modules = trainer.model_parts[0].named_modules()
        kinds.append(
            {x: type(y).__name__ for x, y in modules if isinstance(y, nn.Linear)}
        )
    trainer.close()
    torch.distributed.destroy_process_group()
    return kinds


def main(folder: Path) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    train_on_cpu()
    script_the_clock()
    write_text_and_tokenizer(folder)
    example = runpy.run_path(str(ROOT / "examples" / "with_torchtitan.py"))
    runs: dict[str, list[dict[str, str]]] = {}
    for port, name in enumerate(("profile", "replay"), 29711):
        os.environ["MASTER_PORT"] = str(port)
        runs[name] = run(small(example[name](), folder))
    (folder / "runs.json").write_text(json.dumps(runs))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
