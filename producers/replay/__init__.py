"""Records that were written once are written again: requests, dead letters, status events."""
