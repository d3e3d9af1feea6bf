"""Every op in plain torch: the oracle of the kernels.

It works on the same memory as they do, so a table may be used under both backends in turn. Sums
are taken in float64 and rounded once: what a kernel may differ by is its own rounding. Clear comes
before fast; each contract is documented in the op's own file, ``ops/<op>.py``.
"""
