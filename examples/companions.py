"""ℓ2 and WiSE-FT added to FLOW, on the digits of custom_loop.py.

    pip install ".[demo]"; python examples/companions.py

FLOW works on the data, these on the parameters: they add up.
"""

from __future__ import annotations

import argparse
import copy

from custom_loop import accuracy, fine_tune, pretrain
from torch import nn

from flowdata import ParameterAnchor
from flowdata.companions import sweep_wise_ft


def main(argv: list[str] | None = None) -> dict[str, tuple[float, float]]:
    """Print and return (old, new) accuracy of each way to fine-tune."""
    parser = argparse.ArgumentParser(description="ℓ2 and WiSE-FT added to FLOW")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--strength", type=float, default=0.003, help="of the ℓ2 penalty")
    alphas = (0.25, 0.5, 0.75)  # shares of the fine-tuned weights
    parser.add_argument("--alphas", type=float, nargs="+", default=alphas, help="of WiSE-FT")
    options = parser.parse_args(argv)
    pretrained, old, new = pretrain()

    flow = copy.deepcopy(pretrained)
    fine_tune(flow, new, options.epochs)

    anchored = copy.deepcopy(pretrained)
    anchor = ParameterAnchor(anchored, kind="l2", strength=options.strength)
    fine_tune(anchored, new, options.epochs, penalty=anchor)

    def measure(model: nn.Module) -> tuple[float, float]:
        return accuracy(model, old), accuracy(model, new)

    models = {"pre-trained": pretrained, "FLOW": flow, "FLOW + l2": anchored}
    table = {name: measure(model) for name, model in models.items()}
    for alpha, both in sweep_wise_ft(pretrained, flow, options.alphas, measure).items():
        table[f"FLOW + WiSE-FT, {alpha:g}"] = both
    print(f"{'':22}{'upright':>8}{'turned':>10}{'mean':>8}")
    for name, (before, after) in table.items():
        print(f"{name:22}{before:8.3f}{after:10.3f}{(before + after) / 2:8.3f}")
    return table


if __name__ == "__main__":
    main()
