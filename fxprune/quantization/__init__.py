"""Values as 8-bit codes."""
