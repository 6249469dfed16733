"""Each private name of another package that is used here: one test that names it."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers import TORCH_2_11, TORCHAO_0_17

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(__file__).parents[1] / "fp8tune"

_CHECKPOINT = "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"

# Where each is found: a module, and what leads to it there. "()" makes an instance.
PLACES = {
    "_C": "torch _C",
    "_are_functorch_transforms_active": "torch _C._are_functorch_transforms_active",
    "_auto_filter_for_recipe": "torchao.float8 _auto_filter_for_recipe",
    "_autograd": "torch _C._autograd",
    "_buffers": "torch.nn Identity()._buffers",
    "_call_impl": "torch.nn Identity._call_impl",
    "_checkpoint_wrapped_module": f"{_CHECKPOINT} _CHECKPOINT_WRAPPED_MODULE",
    "_compiled_call_impl": "torch.nn Identity._compiled_call_impl",
    "_current_graph_task_id": "torch _C._current_graph_task_id",
    "_debug_get_cache_entry_list": "torch._dynamo.eval_frame _debug_get_cache_entry_list",
    "_dispatch_key_set": "torch _C._dispatch_key_set",
    "_execution_engine": "torch.autograd Variable._execution_engine.queue_callback",
    "_forward_hooks": "torch.nn Identity()._forward_hooks",
    "_forward_module": "lightning.fabric.wrappers _FabricModule",
    "_forward_pre_hooks": "torch.nn Identity()._forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs": "torch.nn Identity()._forward_pre_hooks_with_kwargs",
    "_fsdp_wrapped_module": "torch.distributed.fsdp._common_utils FSDP_WRAPPED_MODULE",
    "_generate_state_key": "lightning Callback._generate_state_key",
    "_get_current_graph_task_keep_graph": (
        "torch _C._autograd._get_current_graph_task_keep_graph"
    ),
    "_get_fsdp_state": "torch.distributed.fsdp FSDPModule._get_fsdp_state",
    "_grouped_mm": "torch _grouped_mm",
    "_model_mapping": "transformers AutoModel._model_mapping",
    "_modules": "torch.nn Identity()._modules",
    "_non_persistent_buffers_set": "torch.nn Identity()._non_persistent_buffers_set",
    "_ops": "torch _ops.OpOverload",
    "_orig_mod": "torch._dynamo OptimizedModule",
    "_overloadpacket": "torch ops.aten.mm.default._overloadpacket",
    "_parameters": "torch.nn Identity()._parameters",
    "_probe_load": "torch._inductor.cpu_vec_isa VecISA._probe_load",
    "_profiler_enabled": "torch.autograd _profiler_enabled",
    "_replicate_for_data_parallel": "torch.nn Identity()._replicate_for_data_parallel",
    "_scaled_dot_product_flash_attention_for_cpu": (
        "torch ops.aten._scaled_dot_product_flash_attention_for_cpu"
    ),
    "_sleep": "torch.cuda _sleep",
    "_to_fp8_rowwise_then_scaled_grouped_mm": (
        "torchao.prototype.moe_training.fp8_grouped_mm "
        "_to_fp8_rowwise_then_scaled_grouped_mm"
    ),
    "_to_mxfp8_then_scaled_grouped_mm": (
        "torchao.prototype.moe_training.mxfp8_grouped_mm "
        "_to_mxfp8_then_scaled_grouped_mm"
    ),
    "_to_mxfp8_then_scaled_mm": (
        "torchao.prototype.moe_training.mxfp8_linear _to_mxfp8_then_scaled_mm"
    ),
    "_top_saved_tensors_default_hooks": (
        "torch _C._autograd._top_saved_tensors_default_hooks"
    ),
    "_version": "torch nn.Parameter()._version",
    "torch._dynamo.config": "torch._dynamo config.recompile_limit",
    "torch._dynamo.convert_frame": "torch._dynamo.convert_frame register_bytecode_hook",
    "torch._dynamo.eval_frame": "torch._dynamo eval_frame",
    "torch._dynamo.variables": (
        "torch._dynamo.variables torch.get_overridable_functions"
    ),
    "torch._dynamo.guards": "torch._dynamo.guards DeletedGuardManagerWrapper",
    "torch._inductor": "torch._inductor list_mode_options",
    "torch._inductor.compile_fx": "torch._inductor.compile_fx compile_fx",
    "torch._inductor.config": "torch._inductor config",
    "torch._inductor.cpu_vec_isa": (
        "torch._inductor.cpu_vec_isa supported_vec_isa_list.__len__"
    ),
    "torch._subclasses": "torch._subclasses FakeTensor",
    "torch._subclasses.fake_tensor": "torch._subclasses.fake_tensor FakeTensorMode",
    "torch.testing._internal.distributed.fake_pg": (
        "torch.testing._internal.distributed.fake_pg FakeStore"
    ),
    "torch.utils._python_dispatch": "torch.utils._python_dispatch TorchDispatchMode",
    "torch.utils._pytree": "torch.utils._pytree tree_leaves",
}
# Set on instances only, in code that tests elsewhere run for real: test_dry_run.py (FSDP),
# test_uneven_ranks.py (Join) and test_all_gather.py (FSDP's parameters).
ELSEWHERE = {
    "_fsdp_param_groups",
    "_fsdp_use_orig_params",
    "_init_extensions",
    "_is_fsdp_managed_module",
    "_join_config",
    "_local_tensor",
    "_module_info",
    "_mp_policy",
    "_precomputed_scale",
    "_sharded_param_data",
    "_to_sharded",
    "_unsharded_inner_tensors",
    "_unsharded_param",
    "_use_post_forward_mesh",
}
# Not private: names of our own in strings, parts of names, and the standard library's.
OURS = {
    "_asdict",
    "_getframe",
    "_hidden_by_conversion",
    "_replace",
    "_rerouted_gemms",
    "_shown_forward",
}
PARTS = {"_driver", "_runtime", "_hooks", "_k", "_n"}


def names_of(tree: ast.AST) -> Iterator[str]:
    """Private names by attribute, string and import; modules by their whole name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            if text.isidentifier() or re.fullmatch(
                r"torch(\.\w+)*\._\w+(\.\w+)*", text
            ):
                yield text
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module or "", *(x.name for x in node.names))


def defined_in(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
            yield node.attr


def is_private(name: str) -> bool:
    return any(re.match(r"_[^_]", x) for x in name.split("."))


def test_every_private_name_in_use_is_listed() -> None:
    trees = [ast.parse(x.read_text()) for x in sorted(PACKAGE.rglob("*.py"))]
    used = {x for tree in trees for x in names_of(tree) if is_private(x)}
    own = {x for tree in trees for x in defined_in(tree)}
    assert used - own - PARTS - OURS - ELSEWHERE == set(PLACES) - own


def find(place: str) -> object:
    module, path = place.split(" ", 1)
    found: object = importlib.import_module(module)
    for step in path.split("."):
        found = getattr(found, step.removesuffix("()"))
        if step.endswith("()"):
            assert callable(found)
            found = found()
    return found


def is_installed(place: str) -> bool:
    """Trainers are not installed with the oldest and the newest torch."""
    return importlib.util.find_spec(place.partition(".")[0].split()[0]) is not None


@pytest.mark.parametrize("name", PLACES)
def test_a_private_name_is_where_it_was(name: str) -> None:
    place = PLACES[name]
    if not is_installed(place):
        pytest.skip(f"{place.split()[0]} is not installed")
    if TORCHAO_0_17 and "prototype" in place:
        pytest.skip("torchao 0.17 does not have it, and the recipe says so")
    if TORCH_2_11 and name == "_probe_load":
        pytest.skip("torch 2.11 loads where it builds, which is left as it is")
    try:
        find(place)
    except (AttributeError, ImportError) as problem:
        users = [x for x in PACKAGE.rglob("*.py") if name in x.read_text()]
        where = ", ".join(str(x.relative_to(PACKAGE.parent)) for x in users)
        pytest.fail(
            f"{name} is no longer at {place} ({problem}); it is used in {where}"
        )
