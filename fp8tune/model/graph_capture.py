"""Graphs that are captured or traced while the model is still tuned."""

import logging

import torch

__all__ = ["GraphCapture"]

logger = logging.getLogger("fp8tune")


class GraphCapture:
    """Tells when a graph is captured, in which nothing may be timed, kept or switched."""

    def __init__(self) -> None:
        self._warned = False

    def is_under_way(self) -> bool:
        """Whether the current stream is captured; a warning the first time.

        Or the call is traced by torch.jit, as TensorBoard's add_graph does: what was done
        beside it would be in the trace.
        """
        if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            return True
        if not torch.cuda.is_available():
            return False
        found = torch.cuda.is_current_stream_capturing()
        if found and not self._warned:
            self._warned = True
            logger.warning(
                "the model is captured in a CUDA graph while fp8tune still tunes it: "
                "nothing can be timed there, and the graph keeps the layers as they are "
                "now. The three warm-up steps that torch takes before a capture are not "
                "enough; train until auto.frozen, or call auto.freeze(), and capture then"
            )
        return found
