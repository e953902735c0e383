"""Measurements: `python -m benchmarks NAME`; each checks equality before it times anything."""
