"""How is a result stored and swept? Formats and locations of results."""
