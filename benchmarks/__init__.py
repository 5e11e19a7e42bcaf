"""Load generator, side-by-side comparison and micro-benchmarks. Nothing here is a test: figures are printed, never asserted."""
