"""Metrics with a release tag, and the places they go."""

from privtrain.tracking.metrics import METRICS, Release
from privtrain.tracking.open import open_machine_tracker, open_tracker, show_release, watched_mirrors
from privtrain.tracking.trackers import NullTracker, Tracker

__all__ = [
    "METRICS",
    "NullTracker",
    "Release",
    "Tracker",
    "open_machine_tracker",
    "open_tracker",
    "show_release",
    "watched_mirrors",
]
