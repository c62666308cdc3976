"""Starting the ranks of a job on machines that others hand out: SLURM, Kubernetes, Ray."""
