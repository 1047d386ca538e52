"""Entries nearer than their store: in memory, or on a local disk."""
