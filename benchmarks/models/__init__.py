"""The networks that the benchmarks and the demo run."""
