"""What cogprep and cogtrain must agree on, and nothing else."""
