"""What tests stand on: groups of ranks, parity with one process, models, counters of collectives."""
