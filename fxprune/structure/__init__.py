"""What may be removed, found by running the graph on identities; and its removal."""
