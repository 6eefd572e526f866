"""Export: adapter, merge, Modelfile, the hub."""
