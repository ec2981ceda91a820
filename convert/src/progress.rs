//! How long work tells what it does, and learns that it should stop.

/// The listener of a long piece of work.
pub trait Progress: Sync {
    /// A step of `total` bytes begins.
    fn start(&self, what: &str, total: u64);
    /// So many more bytes are done.
    fn advance(&self, bytes: u64);
    /// Whether the work should stop. It then returns its `Interrupted` error and leaves nothing behind.
    fn cancelled(&self) -> bool;
}

/// Nobody listens.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn start(&self, _: &str, _: u64) {}

    fn advance(&self, _: u64) {}

    fn cancelled(&self) -> bool {
        false
    }
}
