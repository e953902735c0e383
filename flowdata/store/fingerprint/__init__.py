"""Content fingerprints: what a store compares before it trusts losses computed earlier.

A fingerprint is a hex SHA-256 digest of content alone: addresses, file names, devices and the
process don't change it. Stores keep fingerprints, so a change to one of these files that changes
a digest makes every store of earlier versions unusable: it asks for another mark in `identity.py`.

    model.py      of a model: modules, configuration, parameters, buffers
    modules.py    what of one module counts beside its tensors: class, settings, code, hooks
    checksums.py  of a tensor's bits
    dataset.py    of a data set: its length, its samples, and the view that gives them
    files.py      the files that rows name and don't hold
    containers.py  the same samples held by another class
    callables.py  of a function
    objects.py    any Python object described: functions, classes, attributes
    attributes.py the attributes that objects and classes have
    code.py       what compiled code says, and whose it is
    instructions.py  the names that code reads and fills
    named.py      the values that a function finds by name
    hugging_face.py  of tokenizers and configurations
    view.py       of a Hugging Face data set's format, columns and decoding
    values.py     the rules for plain values, which the others build on
"""

from flowdata.store.fingerprint.callables import fingerprint_callable
from flowdata.store.fingerprint.dataset import fingerprint_dataset
from flowdata.store.fingerprint.hugging_face import fingerprint_tokenizer
from flowdata.store.fingerprint.model import fingerprint_model

__all__ = [
    "fingerprint_callable",
    "fingerprint_dataset",
    "fingerprint_model",
    "fingerprint_tokenizer",
]
