"""What a cache need not keep, so that it does not grow for ever."""

from fp8tune.decision.kinds import Kind, kind_of
from fp8tune.decision.records import Signature
from fp8tune.store.contents import Contents, Key

__all__ = ["KEPT_SIZES", "OTHER_ENVIRONMENTS", "pruned"]

# So many runs of all other environments than the latest run's are kept, the latest ones.
OTHER_ENVIRONMENTS = 200

# So many measurements are kept of a kind that a run is called with, with other numbers of
# rows than in any run: those of a model that is trained with another batch by and by.
KEPT_SIZES = 8


def pruned(contents: Contents) -> Contents:
    """The contents without old runs, and without measurements that serve no run."""
    kept = Contents(problems=contents.problems)
    newest = next(reversed(contents.runs), None)
    others = [x for x in contents.runs if newest and not _same(x[0], newest[0])]
    dropped = set(others[:-OTHER_ENVIRONMENTS])
    kept.runs = {x: run for x, run in contents.runs.items() if x not in dropped}
    called = _called(kept)
    for key, known in contents.measurements.items():
        left = _without_strangers(list(known), _called_with(called, key))
        if left:
            kept.measurements[key] = {x: known[x] for x in known if x in left}
    return kept


def _same(one: Key, other: Key) -> bool:
    return one.environment == other.environment


def _called(contents: Contents) -> dict[Key, set[Signature]]:
    """What the runs are called with, under the key of each of their recipes."""
    called: dict[Key, set[Signature]] = {}
    for (key, _), run in contents.runs.items():
        signatures = {x for layer in run.layers for x, _ in layer.calls}
        for each in key.each():
            called.setdefault(each, set()).update(signatures)
    return called


def _called_with(called: dict[Key, set[Signature]], key: Key) -> set[Signature]:
    """What a recipe is called with, or the whole one of which it is a part."""
    return called.get(key, set()) | called.get(key.whole, set())


def _without_strangers(
    known: list[Signature], called: set[Signature]
) -> set[Signature]:
    left = called.intersection(known)
    strangers = [x for x in known if x not in left]
    kinds = {kind_of(x) for x in called} if strangers else set[Kind]()
    of_kind: dict[Kind, list[Signature]] = {}
    for x in strangers:
        if kind_of(x) in kinds:
            of_kind.setdefault(kind_of(x), []).append(x)
    return left.union(*(x[-KEPT_SIZES:] for x in of_kind.values()))
