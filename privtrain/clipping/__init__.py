"""Per-unit clipping: capture of activations, rules per layer, the clipper itself."""

from privtrain.clipping.clipper import ClippingDiagnostics, PerUnitClipper

__all__ = ["ClippingDiagnostics", "PerUnitClipper"]
