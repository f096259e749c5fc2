"""How does work leave the event loop? Child processes on framed pipes that never outlive their parent."""
