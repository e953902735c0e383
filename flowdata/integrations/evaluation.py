"""Evaluation in a Trainer on the weights: unweighted, whatever weights its data carries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from flowdata.dataset import FlowWeightedDataset
from flowdata.integrations.prepared import BatchCollator, EvaluationCollator

if TYPE_CHECKING:
    # A type checker takes it for a Trainer; without a base it fits before any class of that kind.
    from transformers import Trainer as _Base
else:
    _Base = object


class UnweightedEvaluation(_Base):  # type: ignore[misc]
    """The part of `FlowTrainerMixin` that evaluates: as the Trainer does, without weights."""

    weight_key: str
    data_collator: Any

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Run the Trainer's evaluation, without weights if the data has any."""
        return super().evaluate(unweighted(eval_dataset), *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the Trainer's prediction, without weights if the data has any."""
        return super().predict(unweighted(test_dataset), *args, **kwargs)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Return the Trainer's loader, whose collator takes no label for a weight."""
        with self._collating_without_weights():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Return the Trainer's loader, whose collator takes no label for a weight."""
        with self._collating_without_weights():
            return super().get_test_dataloader(*args, **kwargs)

    @contextmanager
    def _collating_without_weights(self) -> Iterator[None]:
        collator = self.data_collator
        if isinstance(collator, BatchCollator):
            self.data_collator = EvaluationCollator(collator.collate_fn, collator.key)
        try:
            yield
        finally:
            self.data_collator = collator

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the Trainer's evaluation step without weights, if the data has any."""
        return super().prediction_step(model, self._without_weights(inputs), *args, **kwargs)

    def _without_weights(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in inputs.items() if key != self.weight_key}


def unweighted(dataset: Any) -> Any:
    """Return evaluation data without the weights that `FlowWeightedDataset` puts into samples.

    A Trainer drops the columns that a model doesn't take of a Hugging Face data set alone, so that
    one inside another class would keep them.

    Args:
        dataset: what a Trainer takes for it: a data set, a mapping of them, the name of one, None.
    """
    if isinstance(dataset, dict):
        return {name: unweighted(each) for name, each in dataset.items()}
    return dataset.dataset if isinstance(dataset, FlowWeightedDataset) else dataset
