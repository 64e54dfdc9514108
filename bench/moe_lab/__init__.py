"""The laboratory: experiments, benches against rivals, micro-benchmarks. No tool imports it."""
