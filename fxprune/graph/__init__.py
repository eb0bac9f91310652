"""A captured graph: how it comes about, how it is edited, how it is written down."""
