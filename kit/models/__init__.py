"""Models: where they lie, loading, templates, adapters, number formats."""
