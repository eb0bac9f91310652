"""Datasets, their roles, and batches of samples."""
