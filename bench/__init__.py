"""`make bench`: what a rotation costs, beside what people do today. docs/benchmarks.md says how."""
