"""Ops on tables: a contract a file, with kernels by backend in the folders below."""
