//! Tables of all boards, as Markdown: what firmware-configs/README.md and docs/boards.md show between their marks.

use std::fmt::Write as _;

use super::{Board, Tier};

const UNKNOWN: &str = "unknown";

/// What a board is, and what a build for it gets.
pub fn overview(boards: &[Board]) -> String {
    let mut table = "| board | name for `build` and `check` | cores | kernels | memory, GiB | begin with | tier |\n|---|---|---|---|---|---|---|\n".to_owned();
    for board in boards {
        let soc = &board.soc;
        let cores: Vec<String> = soc
            .cores
            .iter()
            .map(|cores| format!("{} × {}", cores.count, cores.kind))
            .collect();
        let memory: Vec<String> = board
            .memory
            .mib
            .iter()
            .map(|&mib| (mib as f64 / 1024.0).to_string())
            .collect();
        let first = &board.recommended;
        // Writing to a string cannot fail.
        let _ = writeln!(
            table,
            "| {} | `{}` | {} | {} | {} | {} {}, {} tokens | {} |",
            board.name,
            board.id,
            if cores.is_empty() {
                "any".to_owned()
            } else {
                cores.join(", ")
            },
            if soc.kernels().is_empty() {
                "plain C++".to_owned()
            } else {
                soc.kernels().join(" ")
            },
            memory.join(", "),
            first.model,
            first.quantisation,
            first.n_ctx,
            match board.tier {
                Tier::Emulated => "emulated",
                Tier::Builds => "builds",
                Tier::Community => "community",
            },
        );
    }
    table
}

/// What is computed, what is measured, and what is unknown about a board's speed.
pub fn speeds(boards: &[Board]) -> String {
    let mut table = "| board | peak bandwidth, GB/s (computed) | bandwidth, GB/s (measured by others) | decode, tokens/s (measured by others) | share of the peak | Pipit on the board |\n|---|---|---|---|---|---|\n".to_owned();
    for board in boards.iter().filter(|board| !board.compatible.is_empty()) {
        let memory = &board.memory;
        let best = board
            .measured
            .iter()
            .max_by(|a, b| a.gb_per_second().total_cmp(&b.gb_per_second()));
        let _ = writeln!(
            table,
            "| {} | {} | {} | {} | {} | {UNKNOWN} |",
            board.name,
            memory
                .peak_gb_per_second
                .map_or_else(|| UNKNOWN.to_owned(), |peak| format!("{peak:.1}")),
            memory.measured.as_ref().map_or_else(
                || UNKNOWN.to_owned(),
                |measured| format!("{:.1}, {}", measured.gb_per_second, measured.how)
            ),
            best.map_or_else(
                || UNKNOWN.to_owned(),
                |best| format!(
                    "{}: {} {}, {}",
                    best.tokens_per_second, best.model, best.quantisation, best.engine
                )
            ),
            board.best_share().map_or_else(
                || UNKNOWN.to_owned(),
                |(share, _)| format!("{:.0} %", share * 100.0)
            ),
        );
    }
    table
}
