"""From a trained network to its float ONNX graph: load, strip, fold, export.

`load.load` reads a model, and `prepare` runs the other three. Each stage ends by proving its own
claim and returns what it measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from gnet_opt.errors import ModelError
from gnet_opt.model import Model
from gnet_opt.preprocess import FloatArray
from gnet_opt.progress import Progress, silent


def prepare(
    model: Model,
    examples: FloatArray,
    out: Path,
    *,
    batch: Literal[1, "dynamic"] = 1,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Strip and fold a model, and write it as a float ONNX file with `input` and `logits`.

    Args:
        model: The loaded model; it is not changed.
        examples: Real pictures, preprocessed with `model.preprocess`, float32 of shape
            (N, planes, H, W) with N of at least 1. Every claim is proved on them.
        out: The file to write.
        batch: 1, or `dynamic` for a symbolic batch dimension.
        progress: Shows the steps.

    Returns:
        JSON-able facts by stage: `load`, `strip`, `fold` and `export`.

    Raises:
        ModelError: A stage failed, or changed the logits by more than it may.
    """
    from gnet_opt.stages.export import trace, write
    from gnet_opt.stages.fold import fold
    from gnet_opt.stages.strip import strip

    examples = np.ascontiguousarray(examples, np.float32)
    planes = model.preprocess.planes
    if examples.ndim != 4 or examples.shape[1] != planes or len(examples) == 0:
        raise ModelError(
            f"The example pictures have the shape {examples.shape}, not (N, {planes}, height, "
            "width) with N of at least 1."
        )
    if not np.isfinite(examples).all():
        raise ModelError("The example pictures have values that are not finite.")
    if batch not in (1, "dynamic"):
        raise ModelError(f"The batch is {batch!r}; it must be 1 or 'dynamic'.")

    facts: dict[str, Any] = {"load": describe(model)}
    stripped = model
    for stage in progress(("strip", "trace", "fold", "export"), "Preparing the float graph"):
        if stage == "strip":
            stripped, facts["strip"] = strip(model, examples)
        elif stage == "trace":
            # What is computed, but not for the logits, has no place in the graph.
            graph, unreached = trace(stripped, examples, batch=batch)
            facts["strip"] |= unreached
        elif stage == "fold":
            facts["fold"] = fold(graph, examples)
        else:
            facts["export"] = write(graph, stripped, examples, out, batch=batch)
    return facts


def describe(model: Model) -> dict[str, Any]:
    """What the manifest says about a loaded model."""
    return {
        "name": model.name,
        "architecture": model.architecture,
        "classes": model.classes,
        "labels": len(model.labels),
        "parameters": sum(parameter.numel() for parameter in model.module.parameters()),
        "sha256": model.sha256,
        "source": model.source,
        "preprocess": model.preprocess.to_dict(),
        "assumptions": list(model.assumptions),
    }
