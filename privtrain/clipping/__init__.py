"""Per-unit clipping: layout of the vector, capture of activations, rules per layer, the clipper itself."""

from privtrain.clipping.clipper import ClippingDiagnostics, PerUnitClipper
from privtrain.clipping.layout import Layout

__all__ = ["ClippingDiagnostics", "Layout", "PerUnitClipper"]
