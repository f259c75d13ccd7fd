"""What cogprep and cogtrain must agree on, and nothing else."""

__version__ = "0.1.0"  # the project's; pyproject.toml reads it from here
