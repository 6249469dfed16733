"""torch.compile: what the user asked for, and when it is applied."""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from fp8tune.compiling.cuda_graphs import uses_cuda_graphs, without_cuda_graphs
from fp8tune.compiling.inductor import settings_of, unset, with_recipe_settings
from fp8tune.config import Context, Timing

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from fp8tune.recipes.recipe import Recipe

__all__ = [
    "Compile",
    "apply_compile",
    "compile_for_trial",
    "compile_options",
    "gate_calls",
    "is_compiled",
    "timing_name",
    "trial_steps",
    "uncompile",
]

# Three times what a trial takes at 1% noise, as simulated in tests/trial.
_AUTO_TRIAL_STEPS = 400

Gate = Callable[[Callable[..., Any]], Callable[..., Any]]

Compile = bool | Mapping[str, Any] | Callable[[nn.Module], Any]


def apply_compile(
    module: nn.Module,
    compile: Compile,
    recipes: Collection[Recipe],
    say: Callable[[int, object], None],
) -> Callable[..., Any]:
    """Compile as asked for.

    Args:
        module: the model.
        compile: what the user asked for.
        recipes: what its Linears may be converted to; what they need is applied, unless
            a function of the user's compiles.
        say: logs.

    Returns:
        What to call for the model: the module itself, compiled in place, or the module
        that the user's callable returned.
    """
    if compile is False:
        return module
    if callable(compile):
        _say_what_is_missing(recipes, say)
        result = compile(module)
        return result if isinstance(result, nn.Module) else module
    options = compile if isinstance(compile, Mapping) else {}
    settings = settings_of(recipes)
    if settings:
        say(logging.INFO, f"compiling with {settings}, as {_in_need(recipes)} needs")
    module.compile(**with_recipe_settings(options, recipes))
    return module


def _say_what_is_missing(
    recipes: Collection[Recipe], say: Callable[[int, object], None]
) -> None:
    for name, value in unset(settings_of(recipes)).items():
        say(
            logging.WARNING,
            f"{_in_need(recipes)} needs torch._inductor.config.{name} = {value}; compile= "
            "is a function of yours, so set it there",
        )


def _in_need(recipes: Iterable[Recipe]) -> str:
    return ", ".join(dict.fromkeys(x.name for x in recipes if settings_of([x])))


def compile_for_trial(compile: Compile) -> Compile:
    """What plans are compiled with while they are tried: the same without CUDA graphs.

    Each plan's graphs would keep their memory until the end of the trial.

    Returns:
        The very same, where there are no graphs, or a function of the user's compiles.
    """
    if compile is False or callable(compile):
        return compile
    options = compile if isinstance(compile, Mapping) else {}
    return without_cuda_graphs(options) if uses_cuda_graphs(options) else compile


def compile_options(
    compile: Compile, timing: Timing, recipes: Collection[Recipe] = ()
) -> dict[str, Any] | None:
    """Keyword arguments of torch.compile for timing one Linear; None is eager."""
    if timing is Timing.EAGER or (timing is Timing.AUTO and compile is False):
        return None
    options = compile if isinstance(compile, Mapping) else {}
    return with_recipe_settings(options, recipes)


def trial_steps(wanted: int | str, compile: Compile) -> int:
    """Training steps that a trial may take: "auto" tries only compiled models."""
    if isinstance(wanted, int):
        return wanted
    return 0 if compile is False else _AUTO_TRIAL_STEPS


def timing_name(options: Mapping[str, Any] | None, context: Context) -> str:
    """How Linears are timed, in words; timings of different names do not compare."""
    around = "" if context is Context.LINEAR else f", {context.value}"
    if options is None:
        return f"{Timing.EAGER.value}{around}"
    said = ", ".join(f"{name}={value!r}" for name, value in sorted(options.items()))
    return f"{Timing.COMPILED.value}{f'({said})' if said else ''}{around}"


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile(module) or module.compile() was called; both leave a mark.

    torch has no public question for it.
    """
    wrapped = type(module).__name__ == "OptimizedModule"
    return wrapped or getattr(module, "_compiled_call_impl", None) is not None


def uncompile(module: nn.Module) -> None:
    """Undo module.compile() on the model and its parts."""
    for child in module.modules():
        if getattr(child, "_compiled_call_impl", None) is not None:
            child._compiled_call_impl = None  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]


def gate_calls(
    module: nn.Module, target: Callable[..., Any], gate: Gate
) -> tuple[Callable[..., Any], Callable[[], None]]:
    """Put a gate around every call of the model, whichever way it is called.

    Hooks cannot do that once the model is compiled: Dynamo would trace them.

    Args:
        module: the model.
        target: what ``apply_compile`` returned for it.
        gate: takes a callable, returns one that is called in its place.

    Returns:
        (what to call for the model, a function that removes the gate).
    """
    compiled = getattr(module, "_compiled_call_impl", None)
    if compiled is not None:
        # torch has no public place for a call around the compiled call.
        module._compiled_call_impl = gate(compiled)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]

        def remove() -> None:
            module._compiled_call_impl = compiled  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]

        return target, remove
    if target is not module:
        return gate(target), lambda: None
    own = vars(module).get("forward")
    gated = gate(module.forward)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # A copy that somebody made of all attributes is not the module on trial.
        call = gated if self is module else partial(type(self).forward, self)
        return call(*args, **kwargs)

    forward.shadowed = own  # for fp8tune.model.copies  # pyright: ignore[reportFunctionMemberAccess]
    module.forward = types.MethodType(forward, module)

    def restore() -> None:
        del module.forward
        if own is not None:
            module.forward = own

    return module, restore
