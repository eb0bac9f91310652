"""Budgets, what cuts cost, and the cuts that meet a budget."""
