//! What a person reads when something fails: one line with every cause once, then a hint.
//!
//! In: an error and its causes. Out: text for standard error. The errors of this library name their cause in their
//! own text, those that a program adds as context do not: both come out as one sentence.

use std::error::Error;
use std::io::{self, ErrorKind};

/// The text of an error and its causes, outermost first, with a hint on a line of its own where one is known.
///
/// A cause whose text was said already is not said again. The error's own hint is kept; without one, the system's
/// error at the bottom (no such file, no space, no permission) gives it.
pub fn describe<'error>(causes: impl Iterator<Item = &'error (dyn Error + 'static)>) -> String {
    let mut text = String::new();
    let mut system = None;
    for cause in causes {
        let own = cause.to_string();
        if text.is_empty() {
            text = own;
        } else if !text.contains(&own) {
            text = format!("{text}: {own}");
        }
        system = cause.downcast_ref::<io::Error>().map(io::Error::kind).or(system);
    }
    if let Some(hint) = system.and_then(hint)
        && !text.contains("hint:")
    {
        text = format!("{text}\nhint: {hint}");
    }
    text
}

fn hint(kind: ErrorKind) -> Option<&'static str> {
    Some(match kind {
        ErrorKind::NotFound => "is the path spelled right?",
        ErrorKind::PermissionDenied => "may this user read it, and write beside it?",
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
            "free some space, or name another place for the result"
        }
        ErrorKind::ReadOnlyFilesystem => "name another place for the result",
        ErrorKind::IsADirectory => "this is a folder; name a file",
        ErrorKind::NotADirectory => "this is a file; name a folder",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot read {path}: {source}")]
    struct Says {
        path: &'static str,
        source: io::Error,
    }

    #[test]
    fn a_cause_is_said_once_and_the_system_gives_a_hint() {
        let error = Says {
            path: "a.gguf",
            source: ErrorKind::NotFound.into(),
        };
        let error = anyhow::Error::from(error).context("the import failed");
        assert_eq!(
            describe(error.chain()),
            "the import failed: cannot read a.gguf: entity not found\nhint: is the path spelled right?"
        );
    }

    #[test]
    fn an_errors_own_hint_is_kept() {
        let error =
            anyhow::Error::from(io::Error::from(ErrorKind::NotFound)).context("no model\nhint: get one");
        let text = describe(error.chain());
        assert_eq!(text.matches("hint:").count(), 1, "{text}");
    }

    #[test]
    fn an_error_without_a_known_hint_is_one_line() {
        let error = anyhow::anyhow!("odd");
        assert_eq!(describe(error.chain()), "odd");
    }
}
