"""The parts of HybridStrategy: each serves some of the Trainer's hooks, and owns what it needs to know for that."""
