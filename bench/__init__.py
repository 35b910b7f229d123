"""Measurements against real peers, side by side in one run. Nothing here is imported by the package."""
