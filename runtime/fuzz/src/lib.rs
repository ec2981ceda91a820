//! What the fuzz targets share: the daemon's decoders, without the daemon.
//!
//! The modules are links to the runtime's own files. A dependency on the crate `pipit` would compile llama.cpp
//! anew, for five minutes, with the fuzzer's flags.

pub mod clock;
pub mod journal;
pub mod wire;
