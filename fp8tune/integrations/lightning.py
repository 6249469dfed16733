"""Lightning: tuning inside ``Trainer``; with Fabric, ``fabric.setup(AutoFloat8(model))``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fp8tune.errors import ConfigError
from fp8tune.integrations import needs, resumed
from fp8tune.model.linears import named_linears
from fp8tune.tuner.phases import Phase

if TYPE_CHECKING:
    from torch import nn

    from fp8tune.auto import AutoFloat8
    from fp8tune.plan.plan import Plan

with needs("lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["AutoFloat8Callback"]


class AutoFloat8Callback(Callback):
    """Tunes the LightningModule's model; a resumed run goes on where tuning was.

    How far tuning has come, and in the end the plan, is part of every checkpoint, as the
    state of this callback.

    Args:
        module: name of the attribute of the LightningModule that training_step calls,
            such as "model"; None means the LightningModule itself if it has a forward,
            else its only child with Linears. The plan's names start below it.
        retune_on_other_device: when a checkpoint is resumed on another kind of device
            than its plan was measured on, tune again instead of keeping the plan. This
            changes numerics in mid-run.
        options: those of AutoFloat8: recipe, warmup_steps, compile, cache and so on.

    Attributes:
        auto: the AutoFloat8 around the model, once training has begun.
    """

    def __init__(
        self,
        module: str | None = None,
        *,
        retune_on_other_device: bool = False,
        **options: Any,
    ) -> None:
        self.auto: AutoFloat8 | None = None
        self._name = module
        self._retune = retune_on_other_device
        self._options = options
        self._restored: dict[str, Any] | None = None
        self._logged = False

    @property
    def state_key(self) -> str:
        """Of its own for each module, so that a GAN has the plans of both."""
        return self._generate_state_key(module=self._name)

    @property
    def plan(self) -> Plan | None:
        """The decisions, or None until there are any."""
        return self.auto.plan if self.auto else None

    # Not on_fit_start, before which strategies such as FSDP have not yet restored the
    # checkpoint and called load_state_dict.
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap the model, with the checkpoint's plan or state if there is one."""
        module = _tuned_module(pl_module, self._name)
        ended = self.auto is not None and self.auto.phase is Phase.ABANDONED
        if self.auto is None or self.auto.module is not module or ended:
            state, retune = self._restored, self._retune
            self.auto = resumed(module, state, self._options, retune=retune)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log how many layers were converted, once."""
        if self.plan and not self._logged:
            self._logged = True
            counts = {
                "fp8tune_converted": float(len(self.plan.converted_fqns)),
                "fp8tune_linears": float(len(self.plan.decisions)),
            }
            for logger in trainer.loggers:
                logger.log_metrics(counts, step=trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say it if tuning has not come to its end; layers go back to high precision."""
        assert self.auto is not None
        if self.auto.phase is Phase.WARMUP:
            # For a checkpoint that is saved later, or another fit().
            self._restored = self.auto.tuning_state()
        self.auto.tuner.end_of_run()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """The same where fit() is broken off in the warmup.

        A trial ends collectively, and the other ranks may not have come so far.
        """
        if self.auto is not None and self.auto.phase is Phase.WARMUP:
            self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """How far tuning has come, and the plan, for the checkpoint."""
        if self.auto is None or self.auto.phase is Phase.ABANDONED:
            return self._restored or {}
        return self.auto.tuning_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The same, from the checkpoint."""
        self._restored = state_dict


def _tuned_module(pl_module: LightningModule, name: str | None) -> nn.Module:
    if name is not None:
        return pl_module.get_submodule(name)
    if type(pl_module).forward is not LightningModule.forward:
        return pl_module
    children = {x: y for x, y in pl_module.named_children() if any(named_linears(y))}
    if len(children) != 1:
        raise ConfigError(
            f"{type(pl_module).__name__} has no forward, and its children with Linears "
            f"are {sorted(children)}; say which one training_step calls: "
            'AutoFloat8Callback(module="...")'
        )
    return next(iter(children.values()))
