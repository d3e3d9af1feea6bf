"""Models that say how much a user will like an item, each a file."""
