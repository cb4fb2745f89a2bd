"""7. Numbers → something to look at, without torch."""
