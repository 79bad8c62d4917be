"""Runs on disk: sweeps, logs and reports."""
