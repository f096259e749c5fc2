"""How is a result stored and swept? Formats, the uploader process, where a result lies."""
