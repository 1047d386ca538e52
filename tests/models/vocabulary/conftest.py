"""Fixtures: those of the models' tests, and tiny random models of every family."""

from __future__ import annotations

from tests.models.conftest import _own_cache, docstrings, make_model, minilm, minilm_path, tokenizer

__all__ = ["_own_cache", "docstrings", "make_model", "minilm", "minilm_path", "tokenizer"]
