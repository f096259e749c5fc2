"""What does the same work by other means? Each peer writes the same row, object and three events per query."""
