"""Local response normalisation that stays one operator through `torch.export`.

torch decomposes `local_response_norm` into nine operators, and what quantizes or compiles the
graph afterwards sees only the pieces: one ONNX `LRN` node is smaller, and faster where the
runtime has a kernel for it. A custom operator is opaque to the decomposition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor
from torch.overrides import TorchFunctionMode


@torch.library.custom_op("gnet_opt::lrn", mutates_args=())
def lrn(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """`torch.nn.functional.local_response_norm` as an operator of its own."""
    return F.local_response_norm(x, size, alpha, beta, k)


@lrn.register_fake
def _(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    return torch.empty_like(x)


class KeepLocalResponseNorm(TorchFunctionMode):
    """Within this context, `nn.LocalResponseNorm` and its functional form call `gnet_opt::lrn`.

    Only where ONNX's LRN means the same: four dimensions and an odd window. For an even window
    torch's reaches one channel further down, ONNX's one further up.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace the one function and leave every other as it is."""
        kwargs = kwargs or {}
        if func is F.local_response_norm:
            arguments = _bind(*args, **kwargs)
            if arguments[0].dim() == 4 and arguments[1] % 2 == 1:
                return lrn(*arguments)
        return func(*args, **kwargs)


def _bind(
    input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> tuple[Tensor, int, float, float, float]:
    return input, int(size), float(alpha), float(beta), float(k)


def translation_table() -> dict[Any, Callable[..., Any]]:
    """What `torch.onnx.export` needs to write `gnet_opt::lrn` as ONNX `LRN`.

    torch and ONNX both divide alpha by the window's size, and ONNX calls k the bias:
    https://onnx.ai/onnx/operators/onnx__LRN.html
    """
    from onnxscript import opset18

    def onnx_lrn(x: Any, size: int, alpha: float, beta: float, k: float) -> Any:
        return opset18.LRN(x, size=size, alpha=alpha, beta=beta, bias=k)

    return {torch.ops.gnet_opt.lrn.default: onnx_lrn}
