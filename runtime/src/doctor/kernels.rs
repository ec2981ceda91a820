//! Kernels: does ggml use all that this CPU has?

use super::{Finding, State};
use crate::kernels;

const WHAT: &str = "kernels";

/// Compares what was compiled, what ggml says of itself, and what the CPU says.
pub fn finding() -> Finding {
    let lacking = kernels::lacking();
    if !lacking.is_empty() {
        return Finding::of_error(WHAT, &kernels::refusal(&lacking));
    }
    // Only now: ggml's answer is compiled for the same CPU as its kernels.
    let info = kernels::system_info();
    let reported = kernels::reported(&info);
    judge(&reported, &kernels::unused())
}

fn judge(reported: &[&str], unused: &[&str]) -> Finding {
    if unused.is_empty() {
        return Finding::new(WHAT, State::Ok, reported.join(" "));
    }
    Finding::new(
        WHAT,
        State::Warn,
        format!(
            "built for a lesser CPU: {} are not used; ggml has {}",
            unused.join(", "),
            reported.join(" ")
        ),
    )
    .hint("build it on this machine, or for its CPU: docs/decisions/0012-x86-kernels.md")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lesser_build_is_a_warning() {
        let finding = judge(&["SSE3"], &["AVX2", "FMA"]);
        assert_eq!(finding.state, State::Warn);
        assert!(finding.says.contains("AVX2, FMA"), "{}", finding.says);
        assert_eq!(judge(&["AVX2"], &[]).state, State::Ok);
    }
}
