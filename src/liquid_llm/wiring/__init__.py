"""Parts of a job made from its configuration, and nothing else."""
