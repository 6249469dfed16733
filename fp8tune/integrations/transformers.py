"""Hugging Face Transformers: tuning inside ``Trainer``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fp8tune.errors import ConfigError
from fp8tune.integrations import needs, resumed
from fp8tune.tuner.phases import Phase

if TYPE_CHECKING:
    from torch import nn

    from fp8tune.auto import AutoFloat8
    from fp8tune.plan.plan import Plan

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

# Where it is in a checkpoint's trainer_state.json. Not the class's name: Trainer would
# take that for arguments to make the callback anew with.
_STATE_KEY = "fp8tune"


class AutoFloat8Callback(TrainerCallback):
    """Tunes the Trainer's model; a resumed run goes on where tuning was, or with the plan.

    How far tuning has come, and in the end the plan, is part of every checkpoint, in its
    trainer_state.json.

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
        self._logged = False
        self._unfinished: dict[str, Any] | None = None

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
        """Wrap the model, with the checkpoint's plan or state if there is one."""
        _refuse_compile(args)
        model: nn.Module = kwargs["model"]
        found = _stored(state).pop(_STATE_KEY, None)
        # Else train() was called again.
        if self.auto is None or self.auto.module is not model or self._unfinished:
            found, self._unfinished = found or self._unfinished, None
            self.auto = resumed(model, found, self._options, retune=self._retune)
        _stored(state)[_STATE_KEY] = _WhenSaved(self.auto)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Log the plan, once."""
        assert self.auto is not None
        frozen = self.auto.phase is Phase.FROZEN
        if frozen and self.plan and not self._logged:
            self._logged = True
            self._log(self.plan, state)

    def _log(self, plan: Plan, state: TrainerState) -> None:
        state.log_history.append(
            {
                "fp8tune_converted": len(plan.converted_fqns),
                "fp8tune_linears": len(plan.decisions),
                "step": state.global_step,
            }
        )
        _logger.info("%s", plan)

    on_epoch_end = on_step_end

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Say it if tuning has not come to its end; layers go back to high precision."""
        assert self.auto is not None
        if self.auto.phase is Phase.WARMUP:
            # For a checkpoint that is saved later, or another train().
            self._unfinished = self.auto.tuning_state()
            _stored(state)[_STATE_KEY] = self._unfinished
        self.auto.tuner.end_of_run()


class _WhenSaved:
    """Becomes the tuning state as it is when Trainer copies its own to write it.

    Asking for it in every step would wait for the device.
    """

    def __init__(self, auto: AutoFloat8) -> None:
        self._auto = auto

    def __deepcopy__(self, memo: object) -> dict[str, Any]:
        return self._auto.tuning_state()


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
