"""Dispatch tables: which kernel instance is fastest, as measured on one device.

``build`` makes a :class:`Table` from the CSV of ``pyquant profile``, with a ``cost_model`` for what was not measured;
``check``, ``diff`` and ``score`` judge one. The lookup itself is C++ (cutlass_ext/table.cpp), for Python too:
``lookup``.
"""

from .table import Bucket, CostModel, Entry, Table, read_table

__all__ = ["Bucket", "CostModel", "Entry", "Table", "read_table"]
