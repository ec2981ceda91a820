//! End-to-end tests: real programs, a real broker, a real model.
