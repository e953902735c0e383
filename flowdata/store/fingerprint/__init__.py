"""Content fingerprints: what a store compares before it trusts losses computed earlier.

A fingerprint is a hex SHA-256 digest of content alone: addresses, file names, devices and the
process don't change it. Stores keep fingerprints, so a change to one of these files that changes
a digest makes every store of earlier versions unusable.

    model.py      of a model: modules, settings, configuration, parameters, buffers
    dataset.py    of a data set: its length and samples
    callables.py  of a function (code, defaults, captured values) and of a tokenizer
    values.py     the rules for plain values, which the others build on
"""

from flowdata.store.fingerprint.callables import fingerprint_callable, fingerprint_tokenizer
from flowdata.store.fingerprint.dataset import fingerprint_dataset
from flowdata.store.fingerprint.model import fingerprint_model

__all__ = [
    "fingerprint_callable",
    "fingerprint_dataset",
    "fingerprint_model",
    "fingerprint_tokenizer",
]
