"""Models from where people have them."""

from adaskip_compile.checkpoints.loading import PACKAGED_MODELS, find_package, load_checkpoint, load_structure

__all__ = ["PACKAGED_MODELS", "find_package", "load_checkpoint", "load_structure"]
