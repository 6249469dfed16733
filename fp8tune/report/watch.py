"""What the log says while the accuracy is watched. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fp8tune.decision.watched import Fallen

__all__ = [
    "ITERATOR",
    "RECOMPILES",
    "REVERTED",
    "STAYS",
    "checked_line",
    "failed",
    "fallen_line",
    "remembered_line",
    "stopped_line",
    "unseen_line",
    "watch_lines",
    "watch_sentences",
]

# The worst are named.
_NAMED = 5


def checked_line(step: int, found: Mapping[str, float]) -> str:
    """A check that found nothing wrong."""
    if not found:
        return f"accuracy {step} steps after the freeze: nothing could be measured"
    worst = min(found, key=found.__getitem__)
    return (
        f"accuracy {step} steps after the freeze: {len(found)} layers, the lowest SQNR "
        f"is {found[worst]:.1f} dB ({worst or 'the model itself'})"
    )


def fallen_line(
    step: int, fallen: Mapping[str, float], least_db: float, ending: str
) -> str:
    """Layers that are less accurate than the user allows."""
    worst = sorted(fallen, key=fallen.__getitem__)
    named = ", ".join(
        f"{x or 'the model itself'} {fallen[x]:.1f} dB" for x in worst[:_NAMED]
    )
    more = f" and {len(worst) - _NAMED} more" if len(worst) > _NAMED else ""
    return (
        f"the accuracy of {len(worst)} converted layers fell below min_sqnr_db="
        f"{least_db:g}, {step} steps after the freeze: {named}{more}. {ending}"
    )


def remembered_line(names: Sequence[str]) -> str:
    """Layers that a run with a cached plan leaves in high precision from the start."""
    return (
        f"the accuracy of {_listed(names)} fell in an earlier run, as the cache knows: in "
        "high precision from the start; auto.retune() or `fp8tune forget` begin anew"
    )


def watch_lines(fallen: Iterable[Fallen]) -> list[str]:
    """Below a table of a run: what its checks found, the same of several layers once."""
    alike: dict[str, list[str]] = {}
    for x in fallen:
        alike.setdefault(_found(x), []).append(x.fqn)
    return [f"{_listed(names)}: {found}" for found, names in alike.items()]


def watch_sentences(fallen: Fallen | None) -> list[str]:
    """What a check found of one layer, as the end of its story."""
    if fallen is None:
        return []
    ending = (
        "It went back to high precision, and later runs with this cache begin so"
        if fallen.reverted
        else "It stayed converted, since on_quality was 'warn'"
    )
    return [f"While it trained, {_found(fallen)}.", f"{ending}."]


def _found(fallen: Fallen) -> str:
    return (
        f"{fallen.steps} steps after the freeze a check found an SQNR of "
        f"{fallen.sqnr_db:.1f} dB, below min_sqnr_db={fallen.least_db:g}"
    )


def _listed(names: Sequence[str]) -> str:
    said = ", ".join(x or "the model itself" for x in names[:_NAMED])
    return said + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


STAYS = "They stay converted; on_quality='revert' would take them back"
REVERTED = "They are in high precision from now on"
RECOMPILES = f"{REVERTED}, for which what holds them is compiled once more"


ITERATOR = "it takes an iterator, which can be read only once"


def failed(error: Exception) -> str:
    """Why the model could not be called once more."""
    first_line = str(error).strip().split("\n", 1)[0]
    return f"calling it once more raised {type(error).__name__}: {first_line}"


def stopped_line(step: int, problem: str) -> str:
    """The model cannot be called once more."""
    return (
        f"watch_every: the model was not checked {step} steps after the freeze and will "
        f"not be: {problem}"
    )


def unseen_line(steps: int) -> str:
    """The optimizer steps, and nobody calls the model where it could be watched."""
    return (
        f"watch_every: the optimizer made {steps} steps without a call of the model that "
        "could be watched, as where it is compiled from outside or only parts of it are "
        "called; compile it by compile="
    )
