"""``qlens.explain`` with a cache, for explanations that several tests read."""

import functools

import qlens

cached_explain = functools.cache(qlens.explain)
