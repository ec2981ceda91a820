//! Fault points: places where a test ends the daemon as `kill -9` or a power cut would.
//!
//! In: the environment variable `PIPIT_FAULT=POINT[:N]`. Out: at the N-th passage of the point (the first, unless
//! given) the process kills itself with SIGKILL: nothing is flushed, nothing is said. Only in builds with debug
//! assertions; a release build has none of it. The tests in tests/tests/faults.rs and
//! models.rs go through every point.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// The environment variable.
pub const VARIABLE: &str = "PIPIT_FAULT";

/// A place on the way of a request or of an installation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// The request was received and is good; nothing is written.
    AfterReceive,
    /// It is on the disk; the broker does not know.
    AfterJournal,
    /// The PUBACK for it is on the wire.
    AfterAck,
    /// A chunk of its answer was published.
    MidStream,
    /// The answer is whole, and nowhere but in memory.
    AfterRun,
    /// The final answer is on the wire, and the broker has not confirmed it.
    AfterFinal,
    /// The broker has confirmed the final answer; the journal does not say so yet.
    BeforeMark,
    /// A piece of a model was written.
    ModelFetching,
    /// All of a file is there and is the right one; it has not got its name yet.
    ModelFetched,
    /// It has.
    ModelStored,
    /// The manifest is in the store.
    ModelWritten,
    /// The canary has answered well; nothing is switched yet.
    ModelTried,
    /// The new model is the active one; what is not needed any more is still there.
    ModelSwitched,
    /// The daemon has told the worker to make way.
    ModelChanging,
}

impl Point {
    /// All of them with their names, in the order of a request's way, then of an installation's.
    pub const ALL: [(&'static str, Self); 14] = [
        ("after_receive", Self::AfterReceive),
        ("after_journal", Self::AfterJournal),
        ("after_ack", Self::AfterAck),
        ("mid_stream", Self::MidStream),
        ("after_run", Self::AfterRun),
        ("after_final", Self::AfterFinal),
        ("before_mark", Self::BeforeMark),
        ("model_fetching", Self::ModelFetching),
        ("model_fetched", Self::ModelFetched),
        ("model_stored", Self::ModelStored),
        ("model_written", Self::ModelWritten),
        ("model_tried", Self::ModelTried),
        ("model_switched", Self::ModelSwitched),
        ("model_changing", Self::ModelChanging),
    ];
}

/// Where to end, and how many passages are left before it.
struct Plan {
    point: Point,
    left: AtomicU64,
}

/// To be called where the point is.
pub fn passed(point: Point) {
    if !cfg!(debug_assertions) {
        return;
    }
    static PLAN: OnceLock<Option<Plan>> = OnceLock::new();
    let plan = PLAN.get_or_init(|| {
        let text = std::env::var(VARIABLE).ok()?;
        let plan = parse(&text);
        if plan.is_none() {
            tracing::error!("{VARIABLE}={text} names no fault point");
        }
        plan.map(|(point, passages)| Plan {
            point,
            left: AtomicU64::new(passages),
        })
    });
    if let Some(plan) = plan
        && plan.point == point
        && plan.left.fetch_sub(1, Ordering::Relaxed) == 1
    {
        end();
    }
}

fn parse(text: &str) -> Option<(Point, u64)> {
    let (name, passages) = match text.split_once(':') {
        Some((name, passages)) => (name, passages.parse().ok().filter(|&count| count > 0)?),
        None => (text, 1),
    };
    let (_, point) = Point::ALL.into_iter().find(|(known, _)| *known == name)?;
    Some((point, passages))
}

fn end() -> ! {
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    // Not reached: a process may always kill itself.
    std::process::abort()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans() {
        assert_eq!(parse("after_ack"), Some((Point::AfterAck, 1)));
        assert_eq!(parse("mid_stream:3"), Some((Point::MidStream, 3)));
        for wrong in ["", "after", "after_ack:", "after_ack:0", "after_ack:x"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }
}
