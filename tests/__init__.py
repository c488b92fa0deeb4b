"""The tests, and what benchmarks take from them: a regular package, so that no other called tests is found instead."""
