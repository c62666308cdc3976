"""Reference training runs: LightningModules and data modules that know nothing of parallelism."""
