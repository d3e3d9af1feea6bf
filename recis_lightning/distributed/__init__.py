"""Ranks: collectives, and which rank owns an id."""
