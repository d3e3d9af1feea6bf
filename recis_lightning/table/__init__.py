"""A table and what it keeps: index, rows, policy columns, state."""
