"""Per-unit clipping: capture of activations, rules per layer, the clippers themselves."""

from privtrain.clipping.clipper import ClippingDiagnostics, PerUnitClipper
from privtrain.clipping.cooperative import CooperativeClipper, GradientShards, SumOfParts
from privtrain.clipping.sharded import ShardedClipper

__all__ = [
    "ClippingDiagnostics",
    "CooperativeClipper",
    "GradientShards",
    "PerUnitClipper",
    "ShardedClipper",
    "SumOfParts",
]
