//! What a board's file must say to be of use.

use super::{Board, BoardError};
use crate::model::GgmlType;

const TRIPLES: [&str; 3] = [
    "aarch64-unknown-linux-gnu",
    "armv7-unknown-linux-gnueabihf",
    "riscv64gc-unknown-linux-gnu",
];
/// Smaller than any prompt with a system message.
const LEAST_CONTEXT: u32 = 256;

pub(super) fn check(board: &Board, file: &str) -> Result<(), BoardError> {
    let wrong = |key, message: String| {
        Err(BoardError::Value {
            file: file.to_owned(),
            key,
            message,
        })
    };
    let soc = &board.soc;
    if !TRIPLES.contains(&soc.triple.as_str()) {
        return wrong(
            "triple",
            format!("`{}` is not built for; hint: {}", soc.triple, TRIPLES.join(", ")),
        );
    }
    let Some(needs) = soc.needs() else {
        return wrong(
            "march",
            format!(
                "`{}` begins with a level that is not known; hint: armv8-a, armv8.2-a+fp16+dotprod",
                soc.march
            ),
        );
    };
    if let Some(lacking) = needs
        .iter()
        .find(|need| !soc.features.iter().any(|has| has == *need))
    {
        return wrong(
            "march",
            format!(
                "`{}` needs {lacking}, which features does not have; hint: such a build ends with an illegal instruction",
                soc.march
            ),
        );
    }
    let memory = &board.memory;
    if memory.mib.is_empty() || !memory.mib.is_sorted() {
        return wrong(
            "memory.mib",
            "hint: the sizes that it is sold with, ascending: [2048, 4096]".to_owned(),
        );
    }
    if let Some(peak) = memory.peak_gb_per_second {
        if !(peak > 0.0 && peak < 10_000.0) {
            return wrong(
                "memory.peak_gb_per_second",
                format!("{peak} cannot be; hint: 17.1"),
            );
        }
        if memory.source.is_none() {
            return wrong(
                "memory.source",
                "hint: where the peak comes from, with a date; without a source it is unknown: leave it out"
                    .to_owned(),
            );
        }
    }
    let recommended = &board.recommended;
    if recommended.n_ctx < LEAST_CONTEXT {
        return wrong(
            "recommended.n_ctx",
            format!("{} is of little use; hint: 2048", recommended.n_ctx),
        );
    }
    if GgmlType::of_cache(&recommended.cache_type).is_none() {
        return wrong(
            "recommended.cache_type",
            format!(
                "`{}` is no type of the KV cache; hint: f16, q8_0",
                recommended.cache_type
            ),
        );
    }
    if recommended.slots == 0 {
        return wrong("recommended.slots", "hint: at least 1".to_owned());
    }
    let cores: u32 = soc.cores.iter().map(|cores| cores.count).sum();
    if let Some(threads) = recommended.threads
        && (threads == 0 || cores > 0 && threads > cores)
    {
        return wrong(
            "recommended.threads",
            format!("{threads}, on {cores} cores; hint: one a fast core at most"),
        );
    }
    let sources = memory.measured.iter().map(|measured| &measured.source);
    if sources
        .chain(board.measured.iter().map(|measured| &measured.source))
        .any(String::is_empty)
    {
        return wrong(
            "measured.source",
            "hint: where it is published, with a date".to_owned(),
        );
    }
    let positive = |number: f64| number > 0.0 && number.is_finite();
    let speeds = board
        .measured
        .iter()
        .flat_map(|measured| [measured.tokens_per_second, measured.megabytes_per_token]);
    if !speeds
        .chain(memory.measured.iter().map(|measured| measured.gb_per_second))
        .all(positive)
    {
        return wrong("measured", "hint: speeds and sizes are above 0".to_owned());
    }
    Ok(())
}
