"""Stage 2: what each candidate was called with, seen by hooks during warmup.

The hooks only look. They return nothing, keep detached copies instead of the tensors
themselves, and hang the gradient's hook on the output, which adds no node to the graph.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fp8tune.linears import dtype_name
from fp8tune.memory import is_out_of_memory
from fp8tune.passes import Passes, in_backward
from fp8tune.records import Candidate, Sample, Shape, Signature
from fp8tune.sharding import to_local

__all__ = ["Capture"]

logger = logging.getLogger("fp8tune")


class Capture:
    """Watches the candidates of a model from construction until ``close``.

    Args:
        module: the model.
        candidates: the Linears to watch.
        budget_bytes: bytes of tensors that may be kept; signatures past it are timed
            with random numbers.
    """

    def __init__(
        self, module: nn.Module, candidates: Sequence[Candidate], budget_bytes: int
    ) -> None:
        self._passes = Passes()
        self._budget = budget_bytes
        self._active = False
        self._forwards: dict[str, Counter[Signature]] = {}
        self._recomputes: dict[str, Counter[Signature]] = {}
        self._linears: dict[Shape, nn.Linear] = {}
        self._inputs: dict[Shape, torch.Tensor | None] = {}
        self._grads: dict[Shape, torch.Tensor | None] = {}
        self._weights: dict[Shape, torch.Tensor | None] = {}
        self._at_rest = {x.fqn: weakref.ref(x.linear.weight) for x in candidates}
        self._handles = [self._watch(candidate) for candidate in candidates]
        self._handles.append(module.register_forward_hook(self._forward_ended))

    def _watch(self, candidate: Candidate) -> RemovableHandle:
        hook = partial(self._linear_called, candidate.fqn)
        # Before the hooks of tensor parallelism, which redistribute the output.
        return candidate.linear.register_forward_hook(
            hook, with_kwargs=True, prepend=True
        )

    def begin_forward(self, *, training: bool) -> None:
        """Called before every forward of the model; counts completed training steps.

        Args:
            training: whether this forward belongs to a training step.
        """
        self._active = training
        if training:
            self._passes.begin()

    @property
    def called(self) -> bool:
        """Whether any candidate was called in a training step."""
        return bool(self._forwards)

    @property
    def steps(self) -> int:
        """Completed training steps."""
        return self._passes.steps

    @property
    def waiting(self) -> int:
        """Passes whose graph is alive and whose backward has not begun."""
        return self._passes.waiting

    def close(self) -> None:
        """Remove every hook and let go of every tensor."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._active = False
        self.release_tensors()
        self._linears.clear()

    def release_tensors(self) -> None:
        """Let go of the captured tensors and capture no more of them."""
        self._budget = 0
        self._inputs = dict.fromkeys(self._inputs)
        self._grads = dict.fromkeys(self._grads)
        self._weights = dict.fromkeys(self._weights)

    def calls(self, fqn: str) -> tuple[tuple[Signature, int], ...]:
        """How often a candidate was called with which signature, sorted."""
        forwards = self._forwards.get(fqn, Counter())
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

    def sample(self, signature: Signature) -> Sample:
        """The signature with the tensors that were kept for its shape."""
        shape = signature.shape
        return Sample(
            signature,
            self._linears[shape],
            self._inputs.get(shape),
            self._grads.get(shape),
            self._weights.get(shape),
        )

    def _forward_ended(self, module: nn.Module, args: object, output: object) -> None:
        del module, args
        if not self._active:
            return
        self._active = False
        self._passes.ended(output)

    def _linear_called(
        self,
        fqn: str,
        linear: nn.Linear,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: torch.Tensor,
    ) -> None:
        recompute = in_backward()
        tensor = args[0] if args else kwargs["input"]
        if not (self._active or recompute) or tensor.numel() == 0:
            return
        signature = _signature(linear, tensor, recompute=recompute)
        if self._at_rest[fqn]() is not linear.weight:  # gathered, and soon let go of
            self._keep(self._weights, signature.shape, linear.weight)
        calls = self._recomputes if recompute else self._forwards
        calls.setdefault(fqn, Counter())[signature] += 1
        self._linears.setdefault(signature.shape, linear)
        self._keep(self._inputs, signature.shape, tensor)
        if output.requires_grad:
            output.register_hook(partial(self._gradient_seen, signature.shape))

    def _gradient_seen(self, shape: Shape, grad: torch.Tensor) -> None:
        self._passes.saw_backward()
        self._keep(self._grads, shape, grad)

    def _keep(
        self,
        store: dict[Shape, torch.Tensor | None],
        shape: Shape,
        tensor: torch.Tensor,
    ) -> None:
        local = to_local(tensor)
        if store.get(shape) is not None or local.nbytes > self._budget:
            return
        try:
            # A copy, since the model may change the tensor in place afterwards.
            store[shape] = local.clone()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            logger.info("no memory to keep tensors for timing; using random numbers")
            self.release_tensors()
        else:
            self._budget -= local.nbytes


def _signature(
    linear: nn.Linear, tensor: torch.Tensor, *, recompute: bool
) -> Signature:
    n, k = to_local(linear.weight).shape
    device_type = tensor.device.type
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else None
    shape = Shape(
        m=to_local(tensor).numel() // k,
        k=k,
        n=n,
        input_dtype=dtype_name(tensor.dtype),
        weight_dtype=dtype_name(linear.weight.dtype),
        autocast_dtype=dtype_name(dtype) if dtype else None,
        bias=linear.bias is not None,
    )
    grad = torch.is_grad_enabled()
    return Signature(
        shape,
        grad_input=grad and tensor.requires_grad,
        grad_weight=grad and linear.weight.requires_grad,
        grad_bias=grad and linear.bias is not None and linear.bias.requires_grad,
        recompute=recompute,
    )
