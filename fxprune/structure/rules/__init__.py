"""Rules: what each family of operators does to dimensions."""
