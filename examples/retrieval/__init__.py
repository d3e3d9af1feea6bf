"""Models that find a user's next items among all, each a file."""
