"""Runs on disk: many of them from one file, what their logs look like, and reports on them."""
