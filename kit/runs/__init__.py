"""The run folder: its files, gates, provenance, report."""
