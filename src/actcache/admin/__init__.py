"""Whole stores: what they hold, cost and keep; migration, export, computing again. The library side of ``cachectl``."""
