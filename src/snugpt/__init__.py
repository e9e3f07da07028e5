"""snugpt plans, trains and runs the GPT that fits your GPU."""
