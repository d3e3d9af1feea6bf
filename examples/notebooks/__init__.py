"""Notebooks of the manual, and the program that runs them without Jupyter."""
