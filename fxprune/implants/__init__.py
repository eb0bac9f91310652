"""Cheaper operators for outputs of a layer, instead of removal."""
