"""Examples that show `recis_lightning` at work; run from the root of the repository."""
