"""Replacements of OpenRLHF's classes, in the driver and in its Ray actors."""
