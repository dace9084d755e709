"""Exports of finished models: opened from a cell or a folder, written in a format, verified."""
