"""torchtitan: torchrun -m torchtitan.train --module with_torchtitan --config profile.

Then, as often as you like, the same with --config replay.
"""

from torchtitan.models.llama3 import model_registry
from torchtitan.models.llama3.config_registry import Trainer, llama3_debugmodel

from fp8tune import StaticFilter, TuneConfig
from fp8tune.integrations.torchtitan import plan_converter, profiled


def profile() -> Trainer.Config:
    # A few steps, not compiled and without CUDA graphs; writes plan.json.
    config, tiny = llama3_debugmodel(), TuneConfig(static_filter=StaticFilter.DIVISIBLE)
    config.model_spec = profiled(config.model_spec, "plan.json", config=tiny)
    config.training.disable_cuda_graphs = True
    return config


def replay() -> Trainer.Config:
    by_plan = [plan_converter("plan.json")]
    config = llama3_debugmodel()
    config.model_spec = model_registry("debugmodel", converters=by_plan)
    return config
