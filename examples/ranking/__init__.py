"""Ranking models on MovieLens-100k, each a file, and their table beside RecBole's own models."""
