"""The store: losses on disk, what they were made from, and what survives a crash.

format.py     the specification; files and manifests written and read
folder.py     the folder as a whole: read, written, finished, locked
places.py     where it lies: on a disk or on object storage
remote.py     objects of object storage, with the words of paths
identity.py   what must agree for losses to be reused
random_samples.py  a remark on samples that differ from reading to reading
fingerprint/  digests of models, data sets and functions, of which identities are made
packs.py      the samples of one pack in the columns of all
parts.py      the packs that a run has finished so far
repair.py     what a damaged store still proves
verify.py     which files are whole
lock.py       one process at a time
"""
