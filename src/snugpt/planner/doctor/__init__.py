"""The doctor: what a log says went wrong, what held the memory, and what mends it.

reading -> messages, place -> program -> diagnosis -> mends; without a log machine_checks
"""
