"""Whether ranks may be out of data: torch's ``Join`` around the training loop."""

from __future__ import annotations

import gc

from torch.distributed.algorithms.join import Joinable

__all__ = ["joining"]


def joining() -> bool:
    """Whether this process trains inside of ``torch.distributed.algorithms.Join``, or did.

    Then ranks whose data ended shadow the others' collectives and never come to
    anything else. torch has no public question for it, and keeps no list of what joins.
    """
    kinds = _subclasses(Joinable)
    found = [x for x in gc.get_objects() if type(x) in kinds]
    configs = [getattr(x, "_join_config", None) for x in found]
    return any(getattr(x, "enable", False) for x in configs)


def _subclasses(kind: type) -> set[type]:
    direct = set(kind.__subclasses__())
    return direct.union(*(_subclasses(x) for x in direct))
