"""How is it started and wired? The composition root, the only room that knows all others."""
