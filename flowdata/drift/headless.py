"""Headless networks: those whose output layer was cut off, so that they return features.

Taken for logits, features have a KL as well, of nothing that anybody predicts. An output layer is
cut off by putting an `nn.Identity` in its place, and then the layers that ran last tell::

    activation → pooling → flatten → Identity       features
    linear layer → dropout → Identity               logits
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn import modules

from flowdata.models.compiled import as_written

# Modules of PyTorch whose layers hand on what others made, and those that make features of it.
_HAND_ON = (modules.linear.Identity, modules.flatten.Flatten, modules.flatten.Unflatten)
_HAND_ON_FILES = (modules.dropout.__name__, modules.pooling.__name__)
_FEATURES_FILES = tuple(
    each.__name__ for each in (modules.activation, modules.batchnorm, modules.normalization)
)
# Activations that bound logits, or make log-probabilities of them.
_OF_LOGITS = ("LogSoftmax", "Softmax", "Softmax2d", "Sigmoid", "LogSigmoid", "Tanh", "Hardtanh")


def check_has_head(model: nn.Module, run: Callable[[], Any]) -> None:
    """Refuse a network that returns features where logits are needed.

    It does where an `nn.Identity` at its end, such as takes the place of an output layer, passes on
    what left an activation or a normalisation. A network without an Identity there is taken as it
    is: it may have an output layer of an uncommon kind.

    Args:
        model: the network.
        run: makes its outputs for a sample; what fails in it is left to whoever needs these.

    Raises:
        ValueError: the output layer was cut off.
    """
    if _has_weights_of_its_own(model):
        return
    try:
        with as_written(model), _layers_run(model) as layers:
            run()
    except Exception:  # the layers so far are not those at the end
        return
    identity = None
    for name, layer in reversed(layers):
        if not _hands_on(layer):
            break
        identity = name if isinstance(layer, nn.Identity) else identity
    else:
        return
    if identity is not None and _makes_features(layer):
        raise ValueError(
            "the model must return logits, and it returns features: its nn.Identity "
            f"{identity!r} passes on what {type(layer).__name__} {name!r} made, so that its output "
            "layer was cut off; pass the network with its old output layer, such as "
            "nn.Sequential(body, old_head). If these are logits, take the nn.Identity away"
        )


def _has_weights_of_its_own(model: nn.Module) -> bool:
    """Whether a module that has others within it has a matrix, which may be an output layer."""
    return any(
        parameter.dim() == 2
        for module in model.modules()
        if next(module.children(), None) is not None
        for parameter in module.parameters(recurse=False)
    )


@contextmanager
def _layers_run(model: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """Give a list to which each layer that has none within it is added when it runs, by name."""
    layers: list[tuple[str, nn.Module]] = []

    def added(name: str) -> Any:
        return lambda layer, *_: layers.append((name, layer))

    handles = [
        layer.register_forward_hook(added(name))
        for name, layer in model.named_modules()
        if next(layer.children(), None) is None
    ]
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()


def _hands_on(layer: nn.Module) -> bool:
    return isinstance(layer, _HAND_ON) or type(layer).__module__ in _HAND_ON_FILES


def _makes_features(layer: nn.Module) -> bool:
    kind = type(layer)
    return kind.__module__ in _FEATURES_FILES and kind.__name__ not in _OF_LOGITS
