"""From a trained GoogLeNet to a verified, deployable INT8 bundle for one edge device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gnet_opt import telemetry

if TYPE_CHECKING:
    from torch import nn

    from gnet_opt.bundle import Bundle
    from gnet_opt.preprocess import Preprocess
    from gnet_opt.progress import Progress

telemetry.switch_off()

__version__ = "0.1.0"
__all__ = ["__version__", "optimize"]


def optimize(
    model: nn.Module | str | Path,
    *,
    target: str,
    calibration: str | Path,
    output: str | Path,
    evaluation: str | Path | None = None,
    golden: str | Path | None = None,
    preprocess: Preprocess | None = None,
    labels: Sequence[str] = (),
    name: str = "",
    progress: Progress | None = None,
    **options: Any,
) -> Bundle:
    """Quantize a GoogLeNet for a device and write a verified bundle.

    This is `gnet-opt quantize` for Python.

    Args:
        model: A module of the GoogLeNet family, which is not changed, or what the command takes
            as MODEL: a checkpoint, a model card, `torchvision` or `package.module:factory`.
        target: A target's name, alias or TOML file; `cpu` is this machine's own.
        calibration: Folder of pictures to calibrate on.
        output: Folder of the bundle.
        evaluation: Folder of labelled pictures to measure on; no picture of `calibration`.
        golden: Folder of images of which some travel in the bundle, or `drawn` for drawn ones;
            some of `calibration` by default.
        preprocess: How a picture becomes the module's input; ImageNet's by default. For a module
            only: the other forms say it in a model card.
        labels: The module's class names by index.
        name: A short name for a module.
        progress: Shows how far the work is; silent by default.
        **options: Attributes of `gnet_opt.planning.Options`, such as `max_drop` or `method`.

    Returns:
        The bundle. Its `manifest` has the measured accuracy and latency, and the notes on what was
        assumed.

    Raises:
        GateFailedError: INT8 loses more accuracy than `max_drop`; the bundle is kept beside
            `output` as `NAME.rejected`.
        GnetOptError: Something else failed; nothing is left behind.
    """
    from gnet_opt import pipeline, planning
    from gnet_opt import target as targets
    from gnet_opt.errors import ConfigError
    from gnet_opt.images import ImageSet
    from gnet_opt.progress import silent
    from gnet_opt.stages.load import from_module, load

    if isinstance(model, (str, Path)):
        if preprocess is not None or labels or name:
            raise ConfigError(
                "preprocess, labels and name describe a module; for a checkpoint write them into "
                "a model card and pass the card as model."
            )
        loaded = load(model)
    else:
        loaded = from_module(model, name=name, preprocess=preprocess, labels=labels)
    job = planning.plan(
        loaded,
        targets.find(target),
        Path(output),
        calibration=ImageSet.open(calibration, classes=loaded.labels),
        evaluation=None if evaluation is None else ImageSet.open(evaluation, classes=loaded.labels),
        golden_images=planning.golden_images(golden),
        options=planning.Options(**options),
    )
    result = pipeline.build(job, progress or silent)
    result.raise_if_rejected()
    return result.bundle
