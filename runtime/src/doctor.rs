//! The doctor: looks at everything that `pipit serve` needs, before it needs it.
//!
//! In: a [`Config`] and the root of the file system, so that tests can bring their own. Out: [`Finding`]s, each with
//! what to do where something is amiss. Nothing is changed, and nothing is loaded.

use std::path::Path;

use serde::Serialize;

use crate::board::Board;
use crate::config::Config;

pub mod board;
pub mod broker;
pub mod door;
pub mod kernels;
pub mod machine;
pub mod model;
pub mod storage;

#[cfg(test)]
mod tests;

/// How a finding is to be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// As it should be.
    Ok,
    /// Neither good nor bad.
    Info,
    /// It works, and could be better.
    Warn,
    /// `pipit serve` will not do its work.
    Fail,
}

/// One look at one thing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub what: &'static str,
    /// How it is.
    pub state: State,
    /// What was seen.
    pub says: String,
    /// What to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl Finding {
    fn new(what: &'static str, state: State, says: impl Into<String>) -> Self {
        Self {
            what,
            state,
            says: says.into(),
            hint: None,
        }
    }

    fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// From an error's text: what stands behind `hint:` is the hint.
    fn of_error(what: &'static str, error: &impl std::fmt::Display) -> Self {
        let text = error.to_string();
        match text.split_once("hint: ") {
            Some((says, hint)) => {
                Self::new(what, State::Fail, says.trim_end_matches([';', ' ', '\n'])).hint(hint)
            }
            None => Self::new(what, State::Fail, text),
        }
    }
}

/// Looks at all but the broker, which is another machine.
pub fn look(config: &Config, root: &Path) -> Vec<Finding> {
    let state = storage::State::of(config);
    let mut findings: Vec<Finding> = Board::here(root).iter().map(board::about).collect();
    findings.push(kernels::finding());
    findings.extend(machine::findings(config, root));
    findings.extend(state.findings(config));
    findings.extend(door::finding(config, state.in_use()));
    findings.extend(model::findings(config, root, state.in_use()));
    findings
}
