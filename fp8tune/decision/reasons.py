"""Why a Linear ended as it did."""

from enum import StrEnum

__all__ = ["Reason"]


class Reason(StrEnum):
    """Why a layer ended as it did; ``sentence`` says it in words."""

    FASTER = "faster"
    SLOWER = "slower"
    NO_CLEAR_DIFFERENCE = "no_clear_difference"
    EXPECTED_FASTER = "expected_faster"
    EXPECTED_SLOWER = "expected_slower"
    ACCURACY = "accuracy"
    ACCURACY_FELL = "accuracy_fell"
    NOT_THE_FASTEST = "not_the_fastest"
    LESS_ACCURATE = "less_accurate"
    LESS_MEMORY = "less_memory"
    MORE_MEMORY = "more_memory"
    FASTER_IN_TRAINING = "faster_in_training"
    SLOWER_IN_TRAINING = "slower_in_training"
    UNCLEAR_IN_TRAINING = "unclear_in_training"
    FILTERED_BY_NAME = "filtered_by_name"
    NOT_DIVISIBLE_BY_16 = "not_divisible_by_16"
    NOT_DIVISIBLE_BY_32 = "not_divisible_by_32"
    NOT_DIVISIBLE_BY_128 = "not_divisible_by_128"
    SMALL_KN = "small_kn"
    NOT_PLAIN_LINEAR = "not_plain_linear"
    OWN_FORWARD = "own_forward"
    WEIGHT_SUBCLASS = "weight_subclass"
    WEIGHT_NOT_2D = "weight_not_2d"
    REPLACED = "replaced"
    OTHER_DEVICE = "other_device"
    FUNCTION_TRANSFORM = "function_transform"
    ALREADY_FLOAT8 = "already_float8"
    PARAMETRIZED = "parametrized"
    TIED_TO_EMBEDDING = "tied_to_embedding"
    OUTPUT_LAYER = "output_layer"
    FIRST_OR_LAST = "first_or_last"
    UNSUPPORTED_DTYPE = "unsupported_dtype"
    NOT_FOR_EXPERTS = "not_for_experts"
    NO_GROUPED_GEMM = "no_grouped_gemm"
    NEVER_CALLED = "never_called"
    NO_GRADIENT = "no_gradient"
    WITHOUT_ROWS = "without_rows"
    OUT_OF_MEMORY = "out_of_memory"
    NOT_MEASURED = "not_measured"

    @property
    def sentence(self) -> str:
        """The reason as a sentence for people."""
        return _SENTENCES[self]


_SENTENCES = {
    Reason.FASTER: "its speedup lies clearly above the threshold",
    Reason.SLOWER: "its speedup lies clearly below the threshold",
    Reason.NO_CLEAR_DIFFERENCE: "the interval of its speedup holds the threshold",
    Reason.EXPECTED_FASTER: "it was not timed; its shape lets expect a speedup clearly above "
    "the threshold",
    Reason.EXPECTED_SLOWER: "it was not timed; its shape lets expect a speedup clearly below "
    "the threshold",
    Reason.FASTER_IN_TRAINING: "training steps were faster with it converted",
    Reason.SLOWER_IN_TRAINING: "training steps were faster without converting it",
    Reason.UNCLEAR_IN_TRAINING: "training steps did not show that converting it gains",
    Reason.ACCURACY: "it is fast enough, but less accurate than min_sqnr_db allows",
    Reason.ACCURACY_FELL: "its accuracy fell below min_sqnr_db while training went on",
    Reason.NOT_THE_FASTEST: "another recipe is faster",
    Reason.LESS_ACCURATE: "another recipe is as fast, as far as can be told, and more "
    "accurate",
    Reason.LESS_MEMORY: "it needs the least memory and is not clearly too slow",
    Reason.MORE_MEMORY: "high precision or another recipe needs no more memory",
    Reason.FILTERED_BY_NAME: "its name contains one of filter_fqns",
    Reason.NOT_DIVISIBLE_BY_16: "K or N is no multiple of 16, which float8 GEMMs need",
    Reason.NOT_DIVISIBLE_BY_32: "K or N is no multiple of 32, the size of an mx block",
    Reason.NOT_DIVISIBLE_BY_128: "K or N is no multiple of 128, the size of a block",
    Reason.SMALL_KN: "K or N is below the recipe's static threshold",
    Reason.NOT_PLAIN_LINEAR: "its forward may not be that of nn.Linear",
    Reason.OWN_FORWARD: "a forward was set on the layer itself, which a converted class "
    "would not run, as hooks of accelerate do",
    Reason.WEIGHT_SUBCLASS: "its weight is a tensor subclass, as of a quantized base",
    Reason.WEIGHT_NOT_2D: "its weight is flat or sharded to one dimension at rest",
    Reason.REPLACED: "it came into the model, or was changed, after tuning began",
    Reason.OTHER_DEVICE: "it is on another kind of device than the first Linear, and one plan "
    "has the times of one kind",
    Reason.FUNCTION_TRANSFORM: "it was called under torch.func, whose tensors cannot be "
    "kept for timing",
    Reason.ALREADY_FLOAT8: "it was converted before",
    Reason.PARAMETRIZED: "its weight is computed by a parametrization or a hook",
    Reason.TIED_TO_EMBEDDING: "it is an output layer that shares an embedding's weight",
    Reason.OUTPUT_LAYER: "it makes the scores of a vocabulary; include_output_layer "
    "takes it in",
    Reason.FIRST_OR_LAST: "it is the first or the last Linear; include_output_layer "
    "takes it in",
    Reason.UNSUPPORTED_DTYPE: "the recipe does not take weights of this dtype",
    Reason.NOT_FOR_EXPERTS: "the recipe takes no grouped GEMMs of experts, or none on this "
    "device, and it is a 3-D Parameter as of those",
    Reason.NO_GROUPED_GEMM: "no training step multiplied it in a grouped GEMM",
    Reason.NEVER_CALLED: "no training step called it",
    Reason.NO_GRADIENT: "it was called, but no gradient had come back by then",
    Reason.WITHOUT_ROWS: "it was called without rows only, as an expert that no token "
    "chose",
    Reason.OUT_OF_MEMORY: "memory ran out while it was timed",
    Reason.NOT_MEASURED: "it could not be timed",
}
