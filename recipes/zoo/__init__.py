"""Networks that others publish, small and with random weights, and what becomes of each under each layout:
``lightning-dist verify --zoo``."""
