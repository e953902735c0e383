"""The pictures of the guide how_flow_works.md.

    python -m examples.site.pictures

The network of examples/custom_loop.py knows upright digits and has never met turned ones. The
pictures show its losses on these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from examples.custom_loop import pretrain
from flowdata import LossScorer, Scores
from flowdata.report.pictures import BLUE, GREEN, ORANGE, figure, png

FOLDER = Path(__file__).parent.parent / "guides" / "pictures"
SHOWN = 6  # of the easiest digits, and of the hardest


def draw_weights(scores: Scores) -> bytes:
    """Draw the weight against the loss, and the losses and weights of these scores."""
    losses, weights = scores.losses.numpy(), scores.weights().numpy()
    median = float(np.median(losses))
    with figure(9.5, 3.4, panels=2) as (drawing, (left, right)):
        grid = np.linspace(0, 5 * median, 200)
        for factor, colour in ((0.5, ORANGE), (1.0, BLUE), (2.0, GREEN)):
            name = "the median" if factor == 1 else f"{factor:g} × the median"
            left.plot(grid / median, np.exp(-grid / median / factor), color=colour, label=name)
        left.plot([1, 1, 0], [0, np.exp(-1), np.exp(-1)], color="#6b7280", linestyle=":")
        left.annotate("0.37", (0.03, np.exp(-1)), xytext=(2, 3), textcoords="offset points")
        left.set(title="The weight of a sample", xlabel="its loss / the median loss")
        left.set(ylabel="weight", xlim=(0, 5), ylim=(0, 1.02))
        left.legend(title="temperature", frameon=False)
        order = np.argsort(losses)
        share = np.arange(1, len(order) + 1) / len(order) * 100
        right.plot(share, weights[order], color=BLUE)
        right.fill_between(share, weights[order], color=BLUE, alpha=0.2)
        right.set(title="Weights of 1,797 turned digits", xlabel="samples, easiest first (%)")
        right.set(ylabel="weight", xlim=(0, 100), ylim=(0, 1.02))
        return png(drawing)


def draw_digits(scores: Scores, images: Tensor, labels: Tensor) -> bytes:
    """Draw the easiest and the hardest of the images (N, 8, 8), with losses and weights."""
    order = scores.losses.argsort()
    weights = scores.weights()
    with figure(9.5, 3.4, panels=2) as (drawing, axes):
        for place in axes:
            place.remove()
        grid = drawing.add_gridspec(2, SHOWN)
        for row, part in enumerate((order[:SHOWN], order[-SHOWN:].flip(0))):
            for column, index in enumerate(part.tolist()):
                tile: Any = drawing.add_subplot(grid[row, column])
                tile.imshow(images[index], cmap="gray_r")
                tile.set(xticks=[], yticks=[])
                tile.grid(visible=False)
                tile.set_title(f"a {labels[index]}", fontsize=9, loc="center")
                loss, weight = float(scores.losses[index]), float(weights[index])
                tile.set_xlabel(f"loss {loss:.2g}\nweight {weight:.2g}", fontsize=9)
                if column == 0:
                    tile.set_ylabel(("easiest", "hardest")[row], fontsize=11, weight="bold")
        return png(drawing)


def main() -> None:
    """Draw both pictures and write them."""
    model, _, turned = pretrain()
    scores = LossScorer(model, progress=False).score(turned)
    images, labels = turned.tensors
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "weights.png").write_bytes(draw_weights(scores))
    (FOLDER / "digits.png").write_bytes(draw_digits(scores, images.view(-1, 8, 8), labels))
    print(f"written: weights.png and digits.png in {FOLDER}")


if __name__ == "__main__":
    main()
