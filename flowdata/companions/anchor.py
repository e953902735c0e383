"""The parameter anchor: a penalty on the distance from the pre-trained weights, ℓ2 or L1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from flowdata._common.real_numbers import RealNumber, check_factor
from flowdata.companions.penalty import distance
from flowdata.companions.reference import ReferenceLike
from flowdata.companions.starts import Starts
from flowdata.models.calling import unwrapped


class ParameterAnchor:
    """A penalty on the distance of the trainable parameters from where they started.

    ``strength · Σ (θ − θ*)²`` for ``"l2"``, ``strength · Σ |θ − θ*|`` for ``"l1"``, over every
    parameter that requires a gradient when the anchor is called, a tied one once. With LoRA these
    are the adapters; a head that is trained counts, too.

    The square of a complex number is that of its modulus.

    Parameters are looked up by name in every call: the anchor follows weights that are assigned
    (``load_state_dict(assign=True)``), moved, converted, sharded by ``fully_shard``, frozen or
    unfrozen. What it can't follow it refuses: resized embeddings, and parameters that came after
    it, as adapters do.

    It is added to the loss in a loop and in Lightning's `training_step`; under gradient
    accumulation by `AccumulatedBatches`, where nobody divides the loss, as ``anchor() / steps``. To
    a Trainer of any kind it goes by `flowdata.integrations.transformers.add_anchor`.

    Source: ℓ2 as in Sanyal et al., ICML 2025, arXiv:2502.02797, section 5, where its strength
    for language models is 1e-3.

    Args:
        model: the model that will be trained; anchored where it stands now, unless `reference`
            says otherwise.
        kind: ``"l2"`` or ``"l1"``.
        strength: any real number ≥ 0; factor of the sum above.
        reference: θ* from elsewhere: a module, a state dict by parameter name, or the path of a
            checkpoint (a file or folder, in shards or not, safetensors or ``.bin``/``.pt``), of
            which nothing is read into memory but the copies. It is needed when training resumes
            from weights that are no longer θ*.
        device: where the snapshot is kept; ``"cpu"`` spares the accelerator's memory for a
            transfer in each step. None keeps it beside the parameters.

    Raises:
        TypeError: `model` is no module, or `reference` none of those.
        ValueError: an unknown `kind`, a `strength` that is no finite number ≥ 0, nothing to train,
            parameters in flat pieces (FSDP1, ZeRO-3) or on the meta device, complex ones under
            ``"l1"``, or a `reference` that lacks a parameter or has it in another shape or
            quantised.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> anchor = ParameterAnchor(model, strength=0.5)
        >>> with torch.no_grad():
        ...     _ = model.bias.add_(2)
        >>> loss = torch.tensor(1.0) + anchor()
        >>> round(loss.item(), 4)
        3.0
    """

    def __init__(
        self,
        model: nn.Module,
        kind: Literal["l2", "l1"] = "l2",
        strength: RealNumber = 1e-3,
        *,
        reference: ReferenceLike | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        if kind not in ("l2", "l1"):
            is_number = isinstance(kind, int | float)
            hint = f"; for a penalty of that size pass strength={kind!r}" if is_number else ""
            raise ValueError(f"kind must be 'l2' or 'l1', got {kind!r}{hint}")
        self.kind = kind
        self.strength = check_factor("strength", strength)
        self._model = model
        self._starts = Starts(model, reference, None if device is None else torch.device(device))
        _check_kind(kind, [p for p in model.parameters() if p.requires_grad])

    def is_of(self, model: nn.Module) -> bool:
        """Return whether the anchor's model is this one, wrapped or not, a part of it or its whole.

        Args:
            model: as a training loop has it.
        """
        own, other = unwrapped(self._model), unwrapped(model)
        return any(part is own for part in other.modules()) or any(
            part is other for part in own.modules()
        )

    def __call__(self) -> Tensor:
        """Return the penalty: 0-d float32 or wider, on the device of the first parameter.

        Raises:
            ValueError: the model was changed so that θ* of a parameter is not known, or nothing in
                it is trained any more, or something complex under ``"l1"``.
        """
        parameters, starts = self._starts.trained()
        _check_kind(self.kind, parameters)
        return self.strength * distance(2 if self.kind == "l2" else 1, parameters, starts)


def _check_kind(kind: str, parameters: Sequence[Tensor]) -> None:
    if kind == "l1" and any(parameter.is_complex() for parameter in parameters):
        raise ValueError(
            "kind='l1' is for real parameters, and model trains complex ones, whose distance has "
            "no single L1 norm (of moduli, or of both parts); take kind='l2', or freeze them"
        )
