"""Explanations that several tests read, computed once."""

import functools

import qlens

explained = functools.cache(qlens.explain)
