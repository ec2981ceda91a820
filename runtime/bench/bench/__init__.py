"""pipit beside its peers, in one run. `runtime/bench/run --help`; README.md says what each figure means."""
