"""The estimate: what a training step takes of a GPU's memory and time, from numbers alone.

The invariant: but for `reading.py`, which takes those numbers from a run's config, nothing here touches a tensor, a
file or a device. tests/test_estimate.py holds the bytes against the storages that a walk of the model itself keeps, and
both bytes and seconds against what GPUs measured.
"""
