"""Which Linears are candidates, and the reason for each of the others."""

import pytest
import torch
import torchao.float8
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
)
from torch.nn.utils import parametrize, weight_norm
from torchao.float8 import convert_to_float8_training

from fp8tune.config import StaticFilter
from fp8tune.decision.reasons import Reason
from fp8tune.model.candidates import Candidate
from fp8tune.model.screen import screen, unmatched_names
from fp8tune.recipes import get_recipe


def linear(k=64, n=64, dtype=torch.float32):
    return nn.Linear(k, n, bias=False, device="meta", dtype=dtype)


def screened(module, recipe="rowwise", **options):
    options.setdefault("static_filter", StaticFilter.DIVISIBLE)
    return screen(module, [get_recipe(recipe, "cpu")], **options)


def reason(module, recipe="rowwise", **options):
    """Why the only Linear is left out, or None for a candidate."""
    (record,) = screened(module, recipe, **options)
    return None if isinstance(record, Candidate) else record.reason


def candidates(module, recipe="rowwise", **options):
    records = screened(module, recipe, **options)
    return [x.fqn for x in records if isinstance(x, Candidate)]


def stack(number):
    return nn.ModuleDict({"layers": nn.ModuleList(linear() for _ in range(number))})


class Scaled(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, input):
        return 2 * super().forward(input)


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return 2 * weight


def test_a_plain_linear_is_a_candidate():
    module = linear()
    (record,) = screened(module)
    assert isinstance(record, Candidate)
    assert record.linear is module


def test_every_linear_has_one_record_in_model_order():
    shared = linear()
    module = nn.Sequential(linear(), nn.ReLU(), shared, linear(8, 8), shared)
    assert [x.fqn for x in screened(module)] == ["0", "2", "3"]


def test_the_root_has_an_empty_name():
    assert [x.fqn for x in screened(linear())] == [""]


def test_a_name_that_contains_a_filter_is_left_out():
    module = nn.ModuleDict({"wq": linear(), "output": linear()})
    by_name = {x.fqn: x for x in screened(module, filter_fqns=["put"])}
    assert isinstance(by_name["wq"], Candidate)
    assert by_name["output"].reason is Reason.FILTERED_BY_NAME


def test_filters_are_substrings():
    every = {"include_output_layer": True}
    left = candidates(stack(12), filter_fqns=["layers.1"], **every)
    assert left == [f"layers.{i}" for i in (0, 2, 3, 4, 5, 6, 7, 8, 9)]


@pytest.mark.parametrize(
    ("k", "n"), [(15, 64), (17, 64), (24, 64), (64, 15), (64, 17), (64, 24)]
)
@pytest.mark.parametrize("recipe", ["rowwise", "tensorwise", "rowwise_with_gw_hp"])
def test_float8_needs_multiples_of_16(recipe, k, n):
    assert reason(linear(k, n), recipe) is Reason.NOT_DIVISIBLE_BY_16


@pytest.mark.parametrize(("k", "n"), [(16, 16), (16, 48), (48, 16)])
@pytest.mark.parametrize("recipe", ["rowwise", "tensorwise", "rowwise_with_gw_hp"])
def test_multiples_of_16_are_candidates(recipe, k, n):
    assert reason(linear(k, n), recipe) is None


def test_bf16_needs_no_multiples_of_16():
    assert reason(linear(15, 17), "bf16") is None


# torchao's rowwise filter: N <= 2048, or K <= 1024, or N <= 4096 and K <= 2048.
@pytest.mark.parametrize(
    ("k", "n", "expected"),
    [
        (4096, 2032, Reason.SMALL_KN),
        (4096, 2048, Reason.SMALL_KN),
        (4096, 2064, None),
        (1008, 8192, Reason.SMALL_KN),
        (1024, 8192, Reason.SMALL_KN),
        (1040, 8192, None),
        (2048, 4080, Reason.SMALL_KN),
        (2048, 4096, Reason.SMALL_KN),
        (2048, 4112, None),
        (2064, 4096, None),
    ],
)
def test_rowwise_thresholds_are_those_of_torchao(k, n, expected):
    small_kn = StaticFilter.SMALL_KN
    assert reason(linear(k, n), "rowwise", static_filter=small_kn) is expected


# torchao's tensorwise filter: K <= 4096 and N <= 1024.
@pytest.mark.parametrize(
    ("k", "n", "expected"),
    [
        (4080, 1008, Reason.SMALL_KN),
        (4096, 1024, Reason.SMALL_KN),
        (4112, 1024, None),
        (4096, 1040, None),
    ],
)
def test_tensorwise_thresholds_are_those_of_torchao(k, n, expected):
    small_kn = StaticFilter.SMALL_KN
    assert reason(linear(k, n), "tensorwise", static_filter=small_kn) is expected


@pytest.mark.parametrize("recipe", ["rowwise_with_gw_hp", "bf16"])
def test_recipes_without_a_table_have_no_thresholds(recipe):
    small_kn = StaticFilter.SMALL_KN
    assert reason(linear(16, 16), recipe, static_filter=small_kn) is None


def test_divisible_keeps_small_layers():
    divisible = StaticFilter.DIVISIBLE
    assert reason(linear(1024, 1024), static_filter=divisible) is None


def test_what_cannot_run_is_said_before_what_is_small():
    small_kn = StaticFilter.SMALL_KN
    found = reason(linear(17, 17), static_filter=small_kn)
    assert found is Reason.NOT_DIVISIBLE_BY_16


def test_torchao_still_has_the_filter_that_we_use():
    assert callable(getattr(torchao.float8, "_auto_filter_for_recipe", None)), (
        "torchao.float8._auto_filter_for_recipe is gone: without it "
        "fp8tune.recipes.registry finds no thresholds and static_filter='small_kn' does nothing"
    )


def test_the_flag_of_torchtitan_asks_for_the_static_filter():
    module = nn.ModuleDict(
        {"small": linear(), "large": linear(4096, 4096), "output": linear(4096, 4096)}
    )
    names = ["auto_filter_small_kn", "output"]
    assert candidates(module, filter_fqns=["output"]) == ["small", "large"]
    assert candidates(module, filter_fqns=names) == ["large"]


def test_the_flag_is_no_name():
    module = nn.ModuleDict({"auto_filter_small_kn": linear(4096, 4096)})
    flag = ["auto_filter_small_kn"]
    assert candidates(module, filter_fqns=flag) == flag
    assert unmatched_names(linear(), flag) == []


def test_names_that_no_linear_contains_are_told():
    module = nn.ModuleDict({"wq": linear(), "norm": nn.LayerNorm(4)})
    names = ["output", "wq", "norm", "w"]
    assert unmatched_names(module, names) == ["output", "norm"]


def test_a_subclass_is_left_out():
    assert reason(Scaled(64, 64)) is Reason.NOT_PLAIN_LINEAR


def test_a_float8_linear_is_left_out():
    assert reason(convert_to_float8_training(linear())) is Reason.ALREADY_FLOAT8


def test_a_linear_that_a_recipe_converted_is_left_out():
    module = linear()
    get_recipe("rowwise", "cpu").convert(module)
    assert reason(module) is Reason.ALREADY_FLOAT8


def test_a_parametrized_weight_is_left_out():
    module = nn.Linear(64, 64)
    parametrize.register_parametrization(module, "weight", Doubled())
    assert reason(module) is Reason.PARAMETRIZED


def test_an_old_weight_norm_is_left_out():
    with pytest.warns(FutureWarning, match="weight_norm"):
        module = weight_norm(nn.Linear(64, 64))
    assert type(module) is nn.Linear
    assert reason(module) is Reason.PARAMETRIZED


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_output_layer_tied_to_an_embedding_is_left_out(kind):
    module = nn.ModuleDict({"tokens": kind(64, 64), "head": nn.Linear(64, 64)})
    assert reason(module, include_output_layer=True) is None
    module["head"].weight = module["tokens"].weight
    assert reason(module, include_output_layer=True) is Reason.TIED_TO_EMBEDDING


def test_linears_tied_to_each_other_are_candidates():
    module = nn.Sequential(linear(), linear())
    module[1].weight = module[0].weight
    assert candidates(module) == ["0", "1"]


@pytest.mark.parametrize(
    ("recipe", "dtype", "expected"),
    [
        ("rowwise", torch.bfloat16, None),
        ("rowwise", torch.float32, None),
        ("rowwise", torch.float16, Reason.UNSUPPORTED_DTYPE),
        ("rowwise", torch.float64, Reason.UNSUPPORTED_DTYPE),
        ("bf16", torch.float32, None),
        ("bf16", torch.bfloat16, Reason.UNSUPPORTED_DTYPE),
    ],
)
def test_weights_have_a_dtype_that_the_recipe_takes(recipe, dtype, expected):
    assert reason(linear(dtype=dtype), recipe) is expected


def test_names_are_free_of_checkpoint_wrappers():
    block = nn.ModuleDict({"wq": checkpoint_wrapper(linear())})
    module = nn.ModuleDict({"layers": nn.ModuleList([checkpoint_wrapper(block)])})
    assert candidates(module) == ["layers.0.wq"]
    assert candidates(module, filter_fqns=["layers.0.wq"]) == []
    assert unmatched_names(module, ["layers.0.wq"]) == []


def test_a_checkpointed_root_has_an_empty_name():
    assert candidates(checkpoint_wrapper(linear())) == [""]


def names_left_out(module, **options):
    records = screened(module, **options)
    return {x.fqn: x.reason for x in records if not isinstance(x, Candidate)}


class Headed(nn.Module):
    """Embedding, layers, and a head of its own weight for so many tokens."""

    def __init__(self, tokens, number=2, kind=nn.Embedding):
        super().__init__()
        self.tokens = kind(tokens, 64, device="meta")
        self.layers = nn.ModuleList(linear() for _ in range(number))
        self.head = linear(64, 256)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_the_output_layer_of_a_vocabulary_is_left_out(kind):
    module = Headed(256, kind=kind)
    assert names_left_out(module) == {"head": Reason.OUTPUT_LAYER}
    assert names_left_out(module, include_output_layer=True) == {}


def test_a_last_layer_of_another_size_is_no_output_layer():
    assert names_left_out(Headed(255)) == {}


def test_only_the_last_layer_can_be_the_output_layer():
    # As large as the vocabulary, by chance.
    module = Headed(64)
    assert names_left_out(module) == {}


class Chain(nn.Module):
    """Layers of different names, as in a vision model."""

    def __init__(self, number):
        super().__init__()
        for i in range(number):
            self.add_module(f"layer_{'abcdefghij'[i]}", linear())


@pytest.mark.parametrize(("number", "left_out"), [(8, 0), (9, 2), (10, 2)])
def test_the_first_and_last_of_many_are_left_out(number, left_out):
    found = names_left_out(Chain(number))
    names = list(dict(Chain(number).named_children()))
    ends = {names[0]: Reason.FIRST_OR_LAST, names[-1]: Reason.FIRST_OR_LAST}
    assert found == (ends if left_out else {})
    assert names_left_out(Chain(number), include_output_layer=True) == {}


def test_blocks_stay_alike():
    # The first Linear belongs to a repeated block, the last does not.
    assert names_left_out(Headed(255, 9)) == {"head": Reason.FIRST_OR_LAST}
    assert names_left_out(Headed(256, 9)) == {"head": Reason.OUTPUT_LAYER}


def test_a_layer_is_left_to_the_recipes_that_take_it():
    recipes = [get_recipe(x, "cpu") for x in ("blockwise", "rowwise")]
    (record,) = screen(linear(128, 48), recipes, static_filter=StaticFilter.DIVISIBLE)
    assert record.excluded == (("blockwise", Reason.NOT_DIVISIBLE_BY_128),)
    (record,) = screen(linear(128, 40), recipes, static_filter=StaticFilter.DIVISIBLE)
    assert record.reason is Reason.NOT_DIVISIBLE_BY_128
