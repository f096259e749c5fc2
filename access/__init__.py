"""Who may run what over what? Datasets and grants, saved queries, visibility."""
