"""nanochat as a stack: what each dated version is, and the timeline of its training step."""
