"""What Hydra finds by this package's name only: a launcher and a sweeper of the recipes."""
