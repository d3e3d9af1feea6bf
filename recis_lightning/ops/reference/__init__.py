"""Ops in plain torch, the oracle of the kernels.

They work on the same memory as the kernels, so a table may be used under both backends in turn.
Sums are taken in float64 and rounded once: kernels may differ from them by their own rounding only.
Clarity comes before speed. Each contract is documented in the op's own file, ``ops/<op>.py``.
"""
