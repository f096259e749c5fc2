"""What is seen of it? The names of logs, metrics and spans, defined once, and their set-up."""
