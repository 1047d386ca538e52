"""Benchmarks and the demo. Every figure in the docs names the command of this folder that prints it."""
