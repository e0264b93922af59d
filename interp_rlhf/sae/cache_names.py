"""Names of the files and folders of a cache of activations, which also tell them from other files in a training's folder."""

from __future__ import annotations

CACHE_HEAD = "cache.json"
SHARDS = "activations-"  # file-name prefix of activation shards
HELD_OUT = "held-out-"  # prefix of the folders, inside a cache, with the activations of other texts
