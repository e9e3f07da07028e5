"""The parts of `bench/gpu_memory.py`; what a child runs imports torch, the rest does not."""
