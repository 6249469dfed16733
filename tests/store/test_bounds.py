"""A trial in a cache decides roles, which are the same layers of all blocks."""

import pytest

from fp8tune.decision.reasons import Reason
from fp8tune.decision.records import Layer
from fp8tune.decision.trials import TrialRecord
from fp8tune.errors import CacheError
from fp8tune.store.bounds import check_run


def layer(fqn, k=32, reason=None):
    return Layer(fqn, k, 16, "float32", True, reason)


BLOCKS = (layer("blocks.0.w"), layer("blocks.1.w"))


def trial(*converted):
    return TrialRecord(converted, (), ())


def test_half_a_role_is_refused():
    with pytest.raises(CacheError, match=r"converts a part of .*expected all or none"):
        check_run(BLOCKS, trial("blocks.0.w"))


@pytest.mark.parametrize("converted", [(), ("blocks.0.w", "blocks.1.w")])
def test_a_role_that_is_converted_whole_or_not_at_all_is_kept(converted):
    check_run(BLOCKS, trial(*converted))


def test_layers_of_one_name_and_other_sizes_are_two_roles():
    check_run((layer("blocks.0.w"), layer("blocks.1.w", k=64)), trial("blocks.0.w"))


def test_what_was_left_out_is_no_part_of_a_role():
    left_out = layer("blocks.1.w", reason=Reason.FILTERED_BY_NAME)
    check_run((BLOCKS[0], left_out), trial("blocks.0.w"))
