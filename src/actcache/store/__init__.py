"""Stores, and the spaces and collections in them."""
