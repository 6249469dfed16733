"""One input that several layers are called with is copied once."""

import torch
from torch import nn

from fp8tune.model.kept import LastCopy


def test_the_tensor_that_was_copied_last_is_known_until_it_changes():
    copies, tensor = LastCopy(), torch.ones(4)
    assert copies.of(tensor) is None
    copy = tensor.clone()
    copies.remember(tensor, copy)
    assert copies.of(tensor) is copy
    assert copies.of(tensor.clone()) is None
    tensor.add_(1)
    assert copies.of(tensor) is None


def test_a_parameter_can_still_be_moved():
    copies, linear = LastCopy(), nn.Linear(2, 2)
    copies.remember(linear.weight, linear.weight.detach().clone())
    assert copies.of(linear.weight) is None
    future = torch.__future__
    before = future.get_swap_module_params_on_conversion()
    future.set_swap_module_params_on_conversion(True)
    try:
        linear.to(torch.float64)
    finally:
        future.set_swap_module_params_on_conversion(before)


def test_tensors_of_inference_mode_are_copied_each_time():
    copies = LastCopy()
    with torch.inference_mode():
        tensor = torch.ones(4)
    copies.remember(tensor, torch.ones(4))
    assert copies.of(tensor) is None


def test_nothing_is_kept_after_forgetting():
    copies, tensor = LastCopy(), torch.ones(4)
    copies.remember(tensor, tensor.clone())
    copies.forget()
    assert copies.of(tensor) is None
