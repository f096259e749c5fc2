"""How is a result stored and swept? Formats, where a result lies."""
