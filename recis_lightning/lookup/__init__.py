"""One batch through a group of tables."""
