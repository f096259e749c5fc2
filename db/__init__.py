"""What is durable? Migrations and every SQL statement of ours, one module per table group."""
