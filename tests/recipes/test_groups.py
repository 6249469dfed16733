"""Grouped GEMMs of experts in float8: the padding, and what runs between it."""

from __future__ import annotations

import copy
import importlib
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchao.quantization import quantize_

from fp8tune import Reason, get_recipe
from fp8tune.model.experts import stand_in
from fp8tune.model.linears import named_gemms
from fp8tune.recipes import mx, prototypes, torchao
from fp8tune.recipes.groups import from_padded, to_padded
from fp8tune.recipes.hardware import runs_experts
from fp8tune.recipes.torchao import RowwiseExperts
from tests.helpers import TORCHAO_0_17, needs_mxfp8

E, K, N, T = 4, 64, 96, 70

ROUTINGS = {
    "unaligned": (3, 10, 41, T),
    "aligned": (32, 32, 64, 64),
    "empty experts": (0, 0, T, T),
    "all rows in one expert": (0, 0, 0, T),
    "rows that belong to nobody": (3, 10, 11, T - 5),
    "one row": (0, 0, 1, 1),
    "no rows": (0, 0, 0, 0),
}
every_routing = pytest.mark.parametrize("routing", ROUTINGS)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
MX = ["mxfp8_rceil", "mxfp8_floor", "mxfp8_rceil_wgrad_hp"]


def routed(routing):
    """Offsets, and how many rows there are."""
    offs = torch.tensor(ROUTINGS[routing], dtype=torch.int32)
    return offs, {"one row": 1, "no rows": 0, "aligned": 64}.get(routing, T)


def numbers(*shape, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


@every_routing
@pytest.mark.parametrize("multiple", [16, 32])
def test_padded_groups_and_their_offsets(routing, multiple):
    offs, number = routed(routing)
    rows = numbers(number, K)
    padded, ends, places = to_padded(rows, offs, multiple)
    assert ends.dtype is torch.int32
    assert len(padded) % multiple == 0
    start = padded_start = 0
    for end, padded_end in zip(offs.tolist(), ends.tolist(), strict=True):
        size = end - start
        assert padded_end - padded_start == -(-size // multiple) * multiple
        group = padded[padded_start:padded_end]
        assert torch.equal(group[:size], rows[start:end])
        assert not group[size:].any()
        start, padded_start = end, padded_end
    assert padded_start + number - start <= len(padded)
    assert torch.equal(from_padded(padded, places), rows)


def test_the_room_depends_on_the_sizes_alone():
    """So that nobody waits for the device to tell the routing, nor compiles for each."""
    found = {
        to_padded(numbers(T, K), routed(x)[0], 16)[0].shape
        for x in ("unaligned", "empty experts", "all rows in one expert")
    }
    assert found == {(144, K)}  # 70 rows, 4 times 15 more, and then a multiple of 16


@every_routing
def test_gradients_go_the_same_way_back(routing):
    offs, number = routed(routing)
    rows = numbers(number, K, dtype=torch.float64).requires_grad_()

    def there_and_back(rows):
        padded, _, places = to_padded(rows, offs, 16)
        return from_padded(padded * 3, places)

    assert torch.equal(there_and_back(rows), rows * 3)
    (grad,) = torch.autograd.grad(there_and_back(rows).square().sum(), rows)
    assert torch.equal(grad, 18 * rows)


def in_float8(values, dim):
    """As a cast with one power of two as scale along a dimension keeps them."""
    largest = values.float().abs().amax(dim, keepdim=True).clamp(min=1e-12)
    scale = torch.exp2(torch.floor(torch.log2(448 / largest)))
    return ((values.float() * scale).to(torch.float8_e4m3fn).float() / scale).bfloat16()


class RowwiseReference(torch.autograd.Function):
    """What torchao's kernels compute, and what they ask of their operands."""

    @staticmethod
    def forward(ctx, rows, weight, offs):
        assert rows.is_contiguous()
        assert rows.dtype is weight.dtype is torch.bfloat16
        assert weight.stride(-2) == 1
        assert offs.dtype is torch.int32
        assert not (offs % 16).any()
        ctx.save_for_backward(rows, weight, offs)
        return F.grouped_mm(in_float8(rows, 1), in_float8(weight, 1), offs=offs)

    @staticmethod
    def backward(ctx, grad):
        rows, weight, offs = ctx.saved_tensors
        back = in_float8(weight, 2).transpose(-2, -1)
        grad_rows = F.grouped_mm(in_float8(grad, 1), back, offs=offs)
        grad_weight = torch.zeros_like(weight)
        start = 0
        for i, end in enumerate(offs.tolist()):
            if end > start:
                x, g = rows[start:end], grad[start:end]
                grad_weight[i] = in_float8(x, 0).t() @ in_float8(g, 0)
            start = end
        return grad_rows, grad_weight, None


def reference(rows, weight, offs, *, float8_dtype, pad_token_groups_for_grouped_mm):
    assert float8_dtype is torch.float8_e4m3fn
    assert not pad_token_groups_for_grouped_mm  # torchao's raises
    return RowwiseReference.apply(rows, weight, offs)


def computed(gemm, number, dtype=torch.bfloat16):
    """Output and both gradients, without the rows that belong to nobody."""
    rows = numbers(number, K, dtype=dtype).requires_grad_()
    output, last = gemm.owner(rows), int(gemm.owner.offs[-1])
    upstream = numbers(number, N, dtype=dtype)
    weight = gemm.weight
    grads = torch.autograd.grad(output[:last], [rows, weight], upstream[:last])
    assert {output.dtype, grads[0].dtype} == {dtype}
    return output[:last], grads[0][:last], grads[1]


def experts(routing, *, transposed=False, dtype=torch.bfloat16):
    offs, number = routed(routing)
    weight = numbers(E, N, K, dtype=dtype) / 8
    if transposed:
        weight = weight.transpose(-2, -1).contiguous()
    return stand_in(nn.Parameter(weight), offs, transposed=transposed), number


def is_near(found, exact):
    return (found - exact).norm() <= 0.07 * exact.norm()


@every_routing
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rowwise_hands_over_what_the_kernels_take(
    monkeypatch, routing, transposed, dtype
):
    """torchao's kernels need a GPU, so a reference of theirs stands between the padding."""
    monkeypatch.setattr(torchao, "_grouped_mm", lambda: reference)
    gemm, number = experts(routing, transposed=transposed, dtype=dtype)
    exact = computed(gemm, number, dtype)
    recipe = get_recipe("rowwise", "cpu")
    recipe.convert(gemm)
    assert type(gemm) is RowwiseExperts
    for found, expected in zip(computed(gemm, number, dtype), exact, strict=True):
        assert is_near(found, expected)
        assert not found.numel() or not torch.equal(found, expected) or not found.any()
    recipe.revert(gemm)
    for found, expected in zip(computed(gemm, number, dtype), exact, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.gpu
@needs_gpu
@every_routing
@pytest.mark.parametrize("transposed", [False, True])
def test_rowwise_on_a_gpu_computes_as_the_reference(routing, transposed):
    recipe = get_recipe("rowwise", "cuda")
    if not recipe.takes_experts:
        pytest.skip("this GPU has no grouped GEMMs in float8")
    gemm, number = experts(routing, transposed=transposed)
    gemm.owner.cuda().offs = gemm.owner.offs.cuda()
    rows = numbers(number, K).cuda().requires_grad_()
    exact = gemm.owner(rows)
    recipe.convert(gemm)
    output, last = gemm.owner(rows), int(gemm.owner.offs[-1])
    assert is_near(output[:last], exact[:last])
    padded, ends, places = to_padded(rows, gemm.owner.offs, 16)
    weight = gemm.weight if transposed else gemm.weight.transpose(-2, -1)
    lying = weight.transpose(-2, -1).contiguous().transpose(-2, -1)
    found = from_padded(RowwiseReference.apply(padded, lying, ends), places)
    assert (found - output)[:last].norm() <= 0.01 * exact[:last].norm()


@needs_mxfp8
@every_routing
@pytest.mark.parametrize("name", MX)
def test_mxfp8_gives_nearly_the_exact_gradients(routing, name):
    for transposed in (False, True):
        gemm, number = experts(routing, transposed=transposed)
        exact = computed(gemm, number)
        get_recipe(name, "cpu").convert(gemm)
        for found, expected in zip(computed(gemm, number), exact, strict=True):
            assert is_near(found, expected)


class Experts(nn.Module):
    """Two grouped GEMMs, K -> N -> K."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(numbers(E, N, K) / 8)
        self.down = nn.Parameter(numbers(E, K, N) / 8)

    def forward(self, x, offs):
        hidden = F.silu(F.grouped_mm(x, self.up.transpose(-2, -1), offs=offs))
        return F.grouped_mm(hidden, self.down.mT, offs=offs)


def trained(module, number, offs):
    x = numbers(number, K).requires_grad_()
    output = module(x, offs)[: int(offs[-1])]
    wanted = [x, *module.parameters()]
    grads = torch.autograd.grad(output.float().square().sum(), wanted)
    return [output.detach(), *(getattr(x, "_data", x) for x in grads)]


@needs_mxfp8
@pytest.mark.parametrize("name", MX)
@pytest.mark.parametrize(
    "routing", ["unaligned", "aligned", "empty experts", "all rows in one expert"]
)
def test_it_is_bit_equal_to_torchaos_own_conversion(name, routing):
    """By quantize_ with its config for training, which can pad groups itself."""
    config = importlib.import_module("torchao.prototype.moe_training.config")
    enums = mx._torchao()
    offs, number = routed(routing)
    torch.manual_seed(0)
    ours = Experts()
    theirs = copy.deepcopy(ours)
    recipe = get_recipe(name, "cpu")
    for _, gemm in named_gemms(ours):
        recipe.convert(gemm)
    mode = "floor" if name == "mxfp8_floor" else "rceil"
    quantize_(
        theirs,
        config.MXFP8TrainingOpConfig(
            kernel_preference=enums.KernelPreference.EMULATED,
            scale_calculation_mode=enums.ScaleCalculationMode(mode),
            wgrad_with_hp=name.endswith("wgrad_hp"),
            pad_token_groups_for_grouped_mm=True,
        ),
        filter_fn=lambda module, _: isinstance(module, Experts),
    )
    pairs = zip(trained(ours, number, offs), trained(theirs, number, offs), strict=True)
    for found, expected in pairs:
        assert found.dtype is expected.dtype
        assert torch.equal(found, expected)


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))  # noqa: S301 - our own


@needs_mxfp8
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_converted_module_is_copied_and_pickled(copied):
    module, (offs, number) = Experts(), routed("unaligned")
    get_recipe("mxfp8_rceil", "cpu").convert(dict(named_gemms(module))["up"])
    twin = copied(module)
    assert type(dict(named_gemms(twin))["up"]) is mx.MXFP8Experts
    pairs = zip(trained(module, number, offs), trained(twin, number, offs), strict=True)
    assert all(torch.equal(found, expected) for found, expected in pairs)


@needs_mxfp8
@pytest.mark.parametrize("routing", ["unaligned", "no rows"])
def test_mxfp8_experts_compile_into_one_graph(routing):
    gemm, number = experts(routing)
    get_recipe("mxfp8_rceil", "cpu").convert(gemm)
    expected = computed(gemm, number)
    gemm.owner.compile(fullgraph=True, backend="aot_eager")
    for found, exact in zip(computed(gemm, number), expected, strict=True):
        assert torch.equal(found, exact)


def test_the_padding_compiles_into_one_graph():
    def there_and_back(rows, offs):
        padded, _, places = to_padded(rows, offs, 16)
        return from_padded(padded * 3, places)

    rows, (offs, _) = numbers(T, K).requires_grad_(), routed("unaligned")
    compiled = torch.compile(there_and_back, fullgraph=True, dynamic=True)
    assert torch.equal(compiled(rows, offs), rows * 3)
    (grad,) = torch.autograd.grad(compiled(rows, offs).sum(), rows)
    assert torch.equal(grad, torch.full_like(rows, 3))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("rowwise", Reason.NOT_DIVISIBLE_BY_16),
        pytest.param("mxfp8_rceil", Reason.NOT_DIVISIBLE_BY_32, marks=needs_mxfp8),
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_k_and_n_must_fill_blocks(name, reason, transposed):
    def why(n, k):
        weight = nn.Parameter(torch.empty(E, n, k, device="meta"))
        return get_recipe(name, "cpu").supports(stand_in(weight, transposed=transposed))

    multiple = 16 if name == "rowwise" else 32
    assert why(multiple, 2 * multiple) is None
    assert why(multiple + 8, multiple) is reason
    assert why(multiple, multiple + 8) is reason


def test_other_dtypes_are_refused():
    weight = nn.Parameter(torch.empty(E, N, K, device="meta", dtype=torch.float16))
    gemm = stand_in(weight, transposed=False)
    assert get_recipe("rowwise", "cpu").supports(gemm) is Reason.UNSUPPORTED_DTYPE


def test_linears_thresholds_say_nothing_of_experts():
    weight = nn.Parameter(torch.empty(E, 32, 32, device="meta"))
    recipe = get_recipe("rowwise", "cpu")
    assert recipe.static_filter(stand_in(weight, transposed=False)) is None
    linear = nn.Linear(32, 32, device="meta")
    assert recipe.static_filter(linear) is Reason.SMALL_KN


def test_who_takes_experts_on_a_cpu():
    assert get_recipe("bf16", "cpu").takes_experts
    for name in ("rowwise", "tensorwise", "rowwise_with_gw_hp"):
        assert not get_recipe(name, "cpu").takes_experts
    if not TORCHAO_0_17:
        assert all(get_recipe(x, "cpu").takes_experts for x in MX)


def test_experts_that_fail_stay_in_high_precision_with_a_word(caplog):
    def convert(gemm):
        del gemm
        raise RuntimeError("no kernel for sm_90\nmore")

    assert not runs_experts("rowwise", convert, torch.device("cpu"))
    assert "rowwise leaves experts on cpu in high precision: no kernel" in caplog.text
    assert "more" not in caplog.text


def test_torchaos_rowwise_kernels_are_where_they_were():
    """It runs on a GPU only; that it pads groups itself is what it refuses."""
    product = torchao._grouped_mm()
    with pytest.raises(AssertionError, match="not yet supported"):
        product(
            numbers(32, K),
            numbers(E, N, K).transpose(-2, -1),
            torch.tensor([8, 16, 24, 32], dtype=torch.int32),
            float8_dtype=torch.float8_e4m3fn,
            pad_token_groups_for_grouped_mm=True,
        )


@needs_mxfp8
def test_a_torchao_without_the_function_leaves_experts_alone(monkeypatch, caplog):
    recipe = get_recipe("mxfp8_rceil", "cpu")
    real = prototypes.importlib.import_module

    def missing(name):
        if name.endswith("grouped_mm"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name)

    mx._grouped_mm.cache_clear()
    monkeypatch.setattr(prototypes.importlib, "import_module", missing)
    assert not recipe.takes_experts
    assert "leaves experts on cpu in high precision: mxfp8 needs" in caplog.text
