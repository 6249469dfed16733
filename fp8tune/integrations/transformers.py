"""Hugging Face Transformers: tuning inside ``Trainer``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fp8tune.errors import ConfigError
from fp8tune.integrations import freeze_for_checkpoint, needs, resumed
from fp8tune.plan import Plan

if TYPE_CHECKING:
    from torch import nn

    from fp8tune.auto import AutoFloat8

with needs("transformers"):
    from transformers import (
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
    from transformers.utils import logging

__all__ = ["AutoFloat8Callback"]

# A logger of Transformers, so that log_level and log_level_replica of the Trainer's
# arguments decide where the table is seen.
_logger = logging.get_logger("transformers.fp8tune")

# Where the plan is in a checkpoint's trainer_state.json. Not the class's name: Trainer
# would take that for arguments to make the callback anew with.
_STATE_KEY = "fp8tune_plan"


class AutoFloat8Callback(TrainerCallback):
    """Tunes the Trainer's model; a resumed run goes on with the plan that it had.

    The plan is part of every checkpoint, in its trainer_state.json. So that there is
    one, tuning ends at the first checkpoint even if fewer than ``warmup_steps`` were
    seen.

    Args:
        retune_on_other_device: when a checkpoint is resumed on another kind of device
            than its plan was measured on, tune again instead of keeping the plan. This
            changes numerics in mid-run.
        options: those of AutoFloat8: recipe, warmup_steps, compile, cache and so on.

    Attributes:
        auto: the AutoFloat8 around the Trainer's model, once training has begun.
    """

    def __init__(self, *, retune_on_other_device: bool = False, **options: Any) -> None:
        self.auto: AutoFloat8 | None = None
        self._retune = retune_on_other_device
        self._options = options

    @property
    def plan(self) -> Plan | None:
        """The decisions, or None until there are any."""
        return self.auto.plan if self.auto else None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Wrap the model, with the checkpoint's plan if there is one."""
        _refuse_compile(args)
        model: nn.Module = kwargs["model"]
        if self.auto and self.auto.module is model:  # train() was called again
            return
        stored = _stored(state).pop(_STATE_KEY, None)
        plan = None if stored is None else Plan.from_dict(stored, "the checkpoint")
        self.auto = resumed(model, plan, self._options, retune=self._retune)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Put the plan where the next checkpoint takes it from, and log it."""
        assert self.auto is not None
        if control.should_save:
            freeze_for_checkpoint(self.auto)
        plan = self.plan
        if plan and _STATE_KEY not in _stored(state):
            _stored(state)[_STATE_KEY] = plan.to_dict()
            state.log_history.append(
                {
                    "fp8tune_converted": len(plan.float8_fqns),
                    "fp8tune_linears": len(plan.decisions),
                    "step": state.global_step,
                }
            )
            _logger.info("%s", plan)

    on_epoch_end = on_step_end


def _stored(state: TrainerState) -> dict[str, Any]:
    # Annotated as the list that it is made from; a dict from then on.
    found: Any = state.stateful_callbacks
    return found


def _refuse_compile(args: TrainingArguments) -> None:
    if args.torch_compile:
        raise ConfigError(
            "torch_compile=True makes Trainer compile the model before it is tuned; "
            "leave it out and pass compile=True (or a dict of options) to "
            "AutoFloat8Callback"
        )
