"""Train the demo model as it is shipped: `python models/demo/train.py TRAINING_SET VALIDATION_SET`.

README.md says how both sets are rendered. An interrupted run goes on where it was when the same
command is given again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from gnet_opt.images import ImageSet
from gnet_opt.stages.train import train
from gnet_opt.stages.training.recipe import Recipe

RECIPE = Recipe.paper(
    epochs=9,
    early_epochs=6,
    early_size=96,
    size=176,
    learning_rate=0.006,
    averaging=0.998,
    dropout=0.1,
    auxiliary_dropout=0.2,
    photometric=0.25,
    min_crop=0.45,
    precision="bf16",
    threads=1,
    seed=2014,
)
"""The paper's recipe with the few changes that README.md explains."""


T = TypeVar("T")


def show(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Say on stderr now and then how far the work is."""
    for number, item in enumerate(items):
        if number % 100 == 0:
            sys.stderr.write(f"{label}: {number} of {total}\n")
        yield item


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("images", type=Path, help="the training set")
    parser.add_argument("validation", type=Path, help="the set to watch the training with")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write")
    options = parser.parse_args()
    result = train(
        ImageSet.open(options.images),
        options.out,
        RECIPE,
        validation=ImageSet.open(options.validation),
        resume=True,
        name="demo-machine-parts",
        license="Apache-2.0",
        source="Trained by gnet-opt on pictures rendered by calibration/demo/render.py",
        progress=show,
        log=lambda text: print(text, file=sys.stderr),  # noqa: T201
    )
    top1 = 0.0 if result.top1 is None else 100 * result.top1
    sys.stderr.write(
        f"{result.weights}: top-1 {top1:.1f} % of {result.validation_images} pictures, "
        f"{result.seconds:.0f} s.\n"
    )


if __name__ == "__main__":
    main()
