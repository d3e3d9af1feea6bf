"""Ops on tables: one contract a file, and its implementations in a folder for each backend."""
