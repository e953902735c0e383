"""What SFTTrainer's fused head multiplies: hidden states, and the output layer.

SFTTrainer returns log-probabilities of targets and no logits. A rule that looks at the largest
logits and a divergence to the base model need more, so they are made here from the hidden states
that the head was given, tile by tile::

    backbone ── hidden states ──┬── SFTTrainer's head ── log-probabilities
                                └── output layer, tile by tile ── largest logits, divergences
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowdata.head.fused_loss import head_divergences, head_largest_logits, head_losses
from flowdata.head.output_layer import logit_options
from flowdata.losses import base_model
from flowdata.models.calling import innermost, output_layer_of
from flowdata.targets.arguments import check_head, trains
from flowdata.token_weights import LARGEST_LOGITS

_OF_THE_HEAD = ("labels", "shift_labels", "num_items_in_batch", "fused_lm_head")
_ROWS_COMPARED = 16  # of a batch, with SFTTrainer's own log-probabilities


@dataclass(frozen=True)
class Rows:
    """Positions of a batch that take part, and the layer that makes their logits.

    The positions of a batch are B · (T − 1): the last of a row predicts nothing.

    Attributes:
        hidden: (n, d) floating.
        places: (n,) int64, where they stand among the positions.
        shape: (B, T − 1) of the positions.
        head: the output layer.
        options: the scale and softcap of its logits.
    """

    hidden: Tensor
    places: Tensor
    shape: torch.Size
    head: nn.Module
    options: Mapping[str, Any]

    @classmethod
    def of(cls, model: nn.Module, hidden: Tensor, takes_part: Tensor) -> Rows:
        """Return the rows of a model's hidden states.

        Args:
            model: the model.
            hidden: (B, T, d) floating.
            takes_part: (B, T − 1) bool.

        Raises:
            TypeError: the output layer is sharded.
        """
        head: Any = output_layer_of(model)
        check_head(head)
        scale, softcap = logit_options(innermost(model).config.get_text_config())
        places = takes_part.flatten().nonzero().flatten()
        rows = hidden[:, :-1].flatten(0, 1).to(head.weight.device)[places]
        options = {"logit_scale": scale, "softcap": softcap}
        return cls(rows, places, takes_part.shape, head, options)

    def largest_logits(self) -> Tensor:
        """Return the largest logits of all positions, (B · (T − 1), k); 0 where none take part."""
        logits = head_largest_logits(self.hidden, self.head, LARGEST_LOGITS, **self.options)
        zeros = logits.new_zeros(self.shape.numel(), logits.shape[1])
        return zeros.index_copy_(0, self.places, logits)

    def divergences(self, base: Tensor) -> Tensor:
        """Return KL(base ‖ current) of all positions, (B, T − 1), with gradients; 0 of the others.

        Args:
            base: (B, T, d) floating, the base model's hidden states. Virtual tokens are an
                adapter, so that the base has none of their positions.

        Raises:
            ValueError: the output layer is trained, so that it is not the base model's.
        """
        if trains(self.head, self.head):
            raise ValueError(
                "the output layer is trained, so that it is not the base model's, and SFTTrainer "
                "returns no logits of the base: freeze it (out of modules_to_save and "
                "trainable_token_indices), or use FlowTrainer, which takes the base's logits"
            )
        virtual = self.shape[1] + 1 - base.shape[1]
        base = nn.functional.pad(base, (0, 0, virtual, 0))
        rows = base[:, :-1].flatten(0, 1).to(self.hidden.device)[self.places]
        values = head_divergences(rows, self.head, self.hidden, self.head, **self.options)
        zeros = values.new_zeros(self.shape.numel())
        return zeros.index_copy(0, self.places, values).view(self.shape)

    def check(self, log_probs: Tensor, labels: Tensor) -> None:
        """Refuse an output layer whose logits are not those that SFTTrainer's head makes.

        The autocast around the call has to be that in which the head was run.

        Args:
            log_probs: (B, T − 1) floating, of SFTTrainer.
            labels: (B, T) int64, without those of virtual tokens.

        Raises:
            ValueError: they differ by more than rounding.
        """
        places = self.places[:_ROWS_COMPARED]
        virtual = self.shape[1] + 1 - labels.shape[1]
        targets = nn.functional.pad(labels[:, 1:], (virtual, 0)).flatten()[places]
        rows = self.hidden[:_ROWS_COMPARED], self.head, targets
        gaps = head_losses(*rows, **self.options) + log_probs.detach().flatten()[places].float()
        device = self.hidden.device.type
        dtypes = {self.hidden.dtype, next(self.head.parameters()).dtype}
        is_exact = dtypes == {torch.float32} and not torch.is_autocast_enabled(device)
        gap = gaps.abs().mean().item() if len(gaps) else 0.0
        if not gap <= (1e-3 if is_exact else 0.2):
            raise ValueError(
                f"SFTTrainer's loss of a target and that of the model's output layer differ by "
                f"{gap:.3g} nats, so that neither token_rule='eaft' nor kl_to_reference can be "
                "made from the layer; use FlowTrainer, which takes them from the model's logits"
            )


@contextmanager
def recorded_hidden(model: nn.Module) -> Iterator[list[Tensor]]:
    """Record the hidden states, (B, T, d), that the backbone returns in a block."""
    states: list[Tensor] = []

    def record(_: nn.Module, args: Any, output: Any) -> None:
        states.append(output.last_hidden_state)

    handle = innermost(model).base_model.register_forward_hook(record)
    try:
        yield states
    finally:
        handle.remove()


def base_hidden(model: nn.Module, fields: Mapping[str, Any]) -> Tensor:
    """Return the hidden states, (B, T, d), of a PEFT model's base, past the model's own forward.

    Args:
        model: the model.
        fields: what SFTTrainer calls it with; the head's part is left out.
    """
    inputs = {name: value for name, value in fields.items() if name not in _OF_THE_HEAD}
    inputs["use_cache"] = False
    with base_model(model):
        states: Tensor = innermost(model).base_model(**inputs).last_hidden_state
    return states
