"""The search over whole models: branches and units are removed, and real outputs judge."""
