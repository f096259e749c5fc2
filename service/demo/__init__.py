"""The demo: a year of New York's flights, asked about in every way that queryd answers."""
