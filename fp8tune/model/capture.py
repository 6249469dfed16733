"""Stage 2: what each candidate was called with, seen by hooks during warmup.

The hooks only look. They return nothing, keep detached copies instead of the tensors
themselves, and hang the gradient's hook on the output, which adds no node to the graph.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fp8tune.decision.coverage import Coverage
from fp8tune.decision.reasons import Reason
from fp8tune.decision.records import Shape, Signature
from fp8tune.model.called import call_of, mesh_dims, signature_of
from fp8tune.model.candidates import Candidate, Sample
from fp8tune.model.entrances import Entrances
from fp8tune.model.experts import home_of
from fp8tune.model.flops import flops_of, total_of
from fp8tune.model.kept_tensors import KeptTensors
from fp8tune.model.passes import Pass, Passes, in_backward
from fp8tune.model.sharding import fsdp_modules, running_device
from fp8tune.model.tracing import refuse_compiling

__all__ = ["Calls", "Capture"]

Calls = dict[str, Counter[Signature]]


class Capture:
    """Watches the candidates of a model from construction until ``close``.

    Args:
        module: the model.
        candidates: the layers to watch.
        budget_bytes: bytes of tensors that may be kept, see ``fp8tune.model.kept``;
            signatures past it are timed with random numbers.
        gradient_seen: called whenever a gradient reaches the model.
        began: called before each pass of training; may call ``close``.
        give_up: called with the name of a candidate before it is called under torch.func
            for the first time; must leave it in high precision. What is called so is
            counted no more: its tensors cannot be kept, and torchao's layers raise there.

    Attributes:
        without_rows: names of candidates that were called without rows.
        transformed: names of those that were called under torch.func.
        device: where the last call ran, or None: weights may be elsewhere at rest.
    """

    def __init__(
        self,
        module: nn.Module,
        candidates: Sequence[Candidate],
        budget_bytes: int,
        gradient_seen: Callable[[], object] = bool,
        began: Callable[[], object] = bool,
        *,
        give_up: Callable[[str], object] = bool,
    ) -> None:
        self._passes = Passes(gradient_seen, self._confirm)
        linears = {x.fqn: x.linear for x in candidates}
        self._entrances = Entrances(
            module, linears, self._passes, began, self._under_transform
        )
        self._give_up = give_up
        self.transformed: set[str] = set()
        self._gradient_seen = gradient_seen
        self._counted: tuple[list[Any], list[Any]] | None = None
        self._counted_before: Coverage | None = None
        self._trained_in_eval = False
        self._tensors = KeptTensors(budget_bytes)
        self._forwards: Calls = {}
        self._recomputes: Calls = {}
        self._linears: dict[Shape, nn.Linear] = {}
        self._places: dict[Shape, torch.device] = {}
        self.device: torch.device | None = None
        self._module = module
        self._at_rest = {x.fqn: mesh_dims(x.linear.weight) for x in candidates}
        self.without_rows: set[str] = set()
        self._called: set[str] = set()
        self._handles = [self._watch(candidate) for candidate in candidates]

    def _watch(self, candidate: Candidate) -> RemovableHandle:
        hook = partial(self._linear_called, candidate.fqn)
        # Before the hooks of tensor parallelism, which redistribute the output.
        return candidate.linear.register_forward_hook(
            hook, with_kwargs=True, prepend=True
        )

    def _confirm(self, this_pass: Pass) -> None:
        """A gradient came back, so the pass was one of training."""
        self._trained_in_eval = not this_pass.training
        self._entrances.saw_gradient(recomputed=False)
        if this_pass.products is not None and self._counted is None:
            # Not the pass, which lives as long as its graph.
            self._counted = this_pass.calls, this_pass.products
            self._entrances.counting = False
        for fqn, signature in this_pass.calls:
            self._forwards.setdefault(fqn, Counter())[signature] += 1

    def count_products(self) -> None:
        """Count the matrix products of the next forward that gets its backward."""
        self._entrances.counting = True

    @property
    def coverage(self) -> Coverage | None:
        """What candidates are of one forward + backward; None if nobody counted."""
        if self._counted is None or self._counted_before:
            return self._counted_before
        calls, products = self._counted
        calls = [self._with_recompute(*x) for x in calls]
        rest = total_of(products, repeated=bool(self._recomputes))
        return Coverage.of(sum(map(flops_of, calls)), rest)

    def _under_transform(self, fqn: str) -> None:
        if fqn not in self.transformed:
            self.transformed.add(fqn)
            self._give_up(fqn)

    @property
    def uncounted(self) -> tuple[tuple[str, Reason], ...]:
        """(name, why its calls may count for nothing) of candidates, where there were any."""
        empty = dict.fromkeys(self.without_rows, Reason.WITHOUT_ROWS)
        found = empty | dict.fromkeys(self._called, Reason.NO_GRADIENT)
        return tuple(sorted(found.items()))

    @property
    def all_transformed(self) -> bool:
        """Whether every candidate was called under torch.func, so that none is left."""
        return self._at_rest.keys() <= self.transformed

    @property
    def elsewhere(self) -> bool:
        """Whether training mostly calls other things than the model's forward."""
        return self._entrances.elsewhere > self._entrances.forwards

    @property
    def trained_in_eval(self) -> bool:
        """Whether the model was in eval mode in its last pass of training."""
        return self._trained_in_eval

    @property
    def opaque(self) -> bool:
        """Whether no tensor was found in what the model's last forward returned."""
        return self._passes.opaque

    @property
    def recomputes(self) -> bool:
        """Whether backward calls layers again, as activation checkpointing does."""
        return bool(self._recomputes)

    @property
    def waiting(self) -> int:
        """Passes whose graph is alive and whose backward has not begun."""
        self._entrances.end_run()
        return self._passes.waiting

    @property
    def retained(self) -> int:
        """Passes whose graph is alive after a backward, which left it to another."""
        return self._passes.retained

    def close(self) -> None:
        """Remove every hook and let go of every tensor."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._entrances.close()
        self.release_tensors()
        self._linears.clear()

    def release_tensors(self) -> None:
        """Let go of the captured tensors and capture no more of them."""
        self._tensors.release()

    def calls(self, fqn: str) -> tuple[tuple[Signature, int], ...]:
        """How often a candidate was called with which signature, sorted."""
        # A model that is checkpointed as a whole only shows when it is recomputed.
        forwards = self._forwards.get(fqn) or self._recomputes.get(fqn, Counter())
        merged: Counter[Signature] = Counter()
        for signature, count in forwards.items():
            merged[self._with_recompute(fqn, signature)] += count
        return tuple(sorted(merged.items()))

    def _with_recompute(self, fqn: str, signature: Signature) -> Signature:
        # Reentrant checkpointing runs the first forward without gradients; which of them
        # are needed only shows when it is repeated.
        repeats = self._recomputes.get(fqn, Counter())
        for repeat in repeats:
            if repeat.shape == signature.shape:
                return repeat
        return signature

    def counts(self) -> tuple[Calls, Calls]:
        """The calls of training, and those of recomputing: by layer, by signature."""
        return self._forwards, self._recomputes

    def resume(
        self,
        forwards: Calls,
        recomputes: Calls,
        candidates: Sequence[Candidate],
        coverage: Coverage | None = None,
    ) -> None:
        """Go on from counts of an earlier process, of which there are no tensors."""
        self._counted_before = coverage
        for candidate in candidates:
            for mine, theirs in (
                (self._forwards, forwards),
                (self._recomputes, recomputes),
            ):
                for signature, count in theirs.get(candidate.fqn, {}).items():
                    mine.setdefault(candidate.fqn, Counter())[signature] += count
                    self._linears.setdefault(signature.shape, candidate.linear)

    def sample(self, signature: Signature) -> Sample:
        """The signature with the tensors that were kept for its shape, or rows of them."""
        linear = self._linears[signature.shape]
        return self._tensors.sample(signature, linear, self.device_of(signature))

    def device_of(self, signature: Signature) -> torch.device:
        """Where the layer ran that the signature is timed with."""
        place = self._places.get(signature.shape)
        return place or running_device(self._linears[signature.shape])

    def _linear_called(
        self,
        fqn: str,
        linear: nn.Linear,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: torch.Tensor,
    ) -> None:
        if torch.compiler.is_compiling():
            refuse_compiling()
        recompute = in_backward()
        this_pass = None if recompute else self._entrances.current()
        if fqn in self.transformed:
            return
        call = call_of(linear, args, kwargs)
        tensor = call.input
        if tensor.numel() == 0:
            self.without_rows.add(fqn)
            return
        if not (recompute or this_pass):
            return
        self._called.add(fqn)
        signature = signature_of(linear, call, recompute=recompute)
        if self._is_gathered(fqn, linear):  # and soon let go of
            self._tensors.keep_weight(signature.shape, linear.weight)
        if this_pass:
            this_pass.calls.append((fqn, signature))
        else:
            self._recomputes.setdefault(fqn, Counter())[signature] += 1
        self._linears.setdefault(signature.shape, linear)
        self.device = tensor.device
        self._places.setdefault(signature.shape, tensor.device)
        self._tensors.keep_input(signature.shape, tensor, call.offs)
        if output.requires_grad:
            self._wait_for(output, signature, this_pass)

    def _is_gathered(self, fqn: str, linear: nn.Linear) -> bool:
        """Whether FSDP2 made the weight for this call, out of the shards."""
        sharded_now = id(home_of(linear)) in self._sharded
        return sharded_now or mesh_dims(linear.weight) != self._at_rest[fqn]

    @cached_property
    def _sharded(self) -> set[int]:
        # At the first call, since a model may be sharded after it was wrapped.
        return fsdp_modules(self._module)

    def _wait_for(
        self, output: torch.Tensor, signature: Signature, this_pass: Pass | None
    ) -> None:
        if this_pass:
            self._passes.hold(this_pass, output)
        output.register_hook(partial(self._gradient_came, signature))

    def _gradient_came(self, signature: Signature, grad: torch.Tensor) -> None:
        self._gradient_seen()
        self._entrances.saw_gradient(recomputed=signature.recompute)
        self._tensors.keep_grad(signature.shape, grad)
        linear = self._linears.get(signature.shape)
        if linear is not None and id(home_of(linear)) not in self._sharded:
            # As it was when the other two were made, if there is room for it too.
            self._tensors.keep_weight(signature.shape, linear.weight)
