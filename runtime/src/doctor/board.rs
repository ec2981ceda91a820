//! A board that is not here: would a model fit on it, and how fast could it be?
//!
//! In: a [`Board`], a configuration, perhaps the size of its memory. Out: a [`Forecast`], which is computed, and the
//! [`Finding`]s that say it in words. Nothing of it was measured on the board; what was measured there by others is named.

use std::path::Path;

use serde::Serialize;

use super::{Finding, State};
use crate::bench;
use crate::board::{Board, Memory, Tier};
use crate::config::Config;
use crate::model::{self, GgmlType, Header, ModelError};
use crate::plan::{Available, Plan, PlanError, Repack, Settings, mebibytes};

/// What is computed for a model on a board.
#[derive(Clone, Debug, Serialize)]
pub struct Forecast {
    /// The plan, with the board's kernels and threads.
    pub plan: Plan,
    /// Its sum.
    pub bytes: u64,
    /// For each size of the board's memory: what Pipit can have, and whether the model fits.
    pub sizes: Vec<Size>,
    /// Weights, and KV of half of the context, that a token of decode reads.
    pub bytes_per_token: u64,
    /// Decode that no kernel can beat: the peak bandwidth over those bytes; `None` where the peak is unknown.
    pub most_tokens_per_second: Option<f64>,
    /// The share of it that the best measurement on this board reached, and what that makes here.
    pub expected_tokens_per_second: Option<f64>,
    /// What to choose instead, where it does not fit.
    pub instead: Option<String>,
}

/// One size of a board's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Size {
    /// The size.
    pub mib: u64,
    /// What the system is assumed to leave.
    pub left_bytes: u64,
    /// Whether the plan is no more than that.
    pub fits: bool,
}

/// Why nothing can be computed.
#[derive(Debug, thiserror::Error)]
pub enum ForecastError {
    /// The model's file.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The configuration.
    #[error(transparent)]
    Plan(#[from] PlanError),
}

/// Takes the board's recommendations for what nobody set; `set` says what somebody did.
pub fn recommend(board: &Board, config: &mut Config, set: impl Fn(&str) -> bool) {
    let first = &board.recommended;
    let model = &mut config.model;
    if !set("model.n_ctx") {
        model.n_ctx = first.n_ctx;
    }
    if !set("model.slots") {
        model.slots = first.slots;
    }
    if !set("model.cache_type_k") && !set("model.cache_type_v") {
        first.cache_type.clone_into(&mut model.cache_type_k);
        first.cache_type.clone_into(&mut model.cache_type_v);
    }
    if !set("model.threads") {
        model.threads = board.threads();
    }
}

impl Forecast {
    /// Computes it for the model at `path`, on a board with `mib` of memory, or with each size that there is.
    ///
    /// # Errors
    /// [`ForecastError`]
    pub fn of(board: &Board, config: &Config, path: &Path, mib: Option<u64>) -> Result<Self, ForecastError> {
        let header = model::inspect(path)?;
        let settings = Settings {
            // A board of any kind has as many as it has; the plan grows by little with each.
            threads: if config.model.threads == 0 {
                4
            } else {
                config.model.threads
            },
            repack: Repack::of(|name| board.soc.built_in(name)),
            ..Settings::of(config)?
        };
        let plan = Plan::of(&header, &settings);
        let bytes = plan.bytes();
        let sizes: Vec<Size> = mib
            .map_or_else(|| board.memory.mib.clone(), |mib| vec![mib])
            .into_iter()
            .map(|mib| {
                let left_bytes = Memory::left_of(mib);
                Size {
                    mib,
                    left_bytes,
                    fits: bytes <= left_bytes,
                }
            })
            .collect();
        let half = u64::from(settings.n_ctx / 2);
        let kv = bench::kv_per_token(&header, settings.cache_type_k, settings.cache_type_v);
        let bytes_per_token = bench::weights_per_token(&header).saturating_add(kv.saturating_mul(half));
        let peak = board.memory.peak_gb_per_second;
        let most = peak.map(|peak| peak * 1e9 / bytes_per_token.max(1) as f64);
        let instead = sizes
            .last()
            .filter(|size| !size.fits)
            .map(|size| instead(board, &header, &plan, size));
        Ok(Self {
            expected_tokens_per_second: most
                .zip(board.best_share())
                .map(|(most, (share, _))| most * share),
            plan,
            bytes,
            sizes,
            bytes_per_token,
            most_tokens_per_second: most,
            instead,
        })
    }

    /// In words.
    pub fn findings(&self, board: &Board) -> Vec<Finding> {
        vec![about(board), self.memory(), self.decode(board)]
    }

    fn memory(&self) -> Finding {
        const WHAT: &str = "memory";
        let needed = mebibytes(self.bytes);
        let bound = if self.plan.unknown.is_empty() {
            ""
        } else {
            "at least "
        };
        let says = match (self.sizes.iter().find(|size| size.fits), self.sizes.last()) {
            (Some(size), _) => format!(
                "{bound}{needed} needed: fits into {} MiB, of which {} are assumed to be left for Pipit",
                size.mib,
                mebibytes(size.left_bytes)
            ),
            (None, Some(size)) => format!(
                "{bound}{needed} needed: does not fit into {} MiB, of which {} are assumed to be left for Pipit",
                size.mib,
                mebibytes(size.left_bytes)
            ),
            (None, None) => format!("{bound}{needed} needed"),
        };
        match &self.instead {
            Some(instead) => Finding::new(WHAT, State::Fail, says).hint(instead.clone()),
            None if self.plan.unknown.is_empty() => Finding::new(WHAT, State::Ok, says),
            None => Finding::new(WHAT, State::Warn, says).hint(self.plan.unknown.join("; ")),
        }
    }

    fn decode(&self, board: &Board) -> Finding {
        const WHAT: &str = "decode";
        let megabytes = self.bytes_per_token as f64 / 1e6;
        let Some((most, peak)) = self.most_tokens_per_second.zip(board.memory.peak_gb_per_second) else {
            return Finding::new(
                WHAT,
                State::Info,
                format!(
                    "unknown: {megabytes:.1} MB a token, and nobody has published this board's bandwidth"
                ),
            )
            .hint("`pipit bench` on the board measures both");
        };
        let says = format!(
            "at most {most:.1} tokens/s: {megabytes:.1} MB a token, {peak:.1} GB/s at its peak (computed)"
        );
        match board.best_share() {
            Some((share, measured)) => Finding::new(
                WHAT,
                State::Info,
                format!(
                    "{says}; about {:.1} where it reaches the {:.0} % that {} reached with {} {}",
                    most * share,
                    share * 100.0,
                    measured.engine,
                    measured.model,
                    measured.quantisation
                ),
            ),
            None => Finding::new(
                WHAT,
                State::Info,
                format!("{says}; how much of it is reached is unknown"),
            ),
        }
    }
}

/// The board, its cores and its kernels.
pub fn about(board: &Board) -> Finding {
    let soc = &board.soc;
    let kernels = soc.kernels();
    let tier = match board.tier {
        Tier::Emulated => "its build is tested in emulation",
        Tier::Builds => "its build is not tested",
        Tier::Community => "nobody of the project tried it",
    };
    let says = format!(
        "{}, {}: {}; {tier}",
        board.name,
        soc.name,
        if kernels.is_empty() {
            "plain C++ kernels".to_owned()
        } else {
            kernels.join(" ")
        }
    );
    Finding::new("board", State::Info, says)
}

/// Settings that would fit, fewer bits, or another board.
fn instead(board: &Board, header: &Header, plan: &Plan, size: &Size) -> String {
    let available = Available {
        bytes: size.left_bytes,
        by: format!("{} MiB", size.mib),
    };
    let mut ways = Vec::new();
    if let Err(PlanError::TooLarge { hint, .. }) = plan.check(Some(&available)) {
        ways.push(hint);
    }
    let (bytes, elements) = matrices(header);
    let four_bits = GgmlType::of_cache("q4_0").map_or(bytes, |kind| kind.bytes(elements));
    if let Some(saved) = bytes.checked_sub(four_bits).filter(|&saved| saved > bytes / 10) {
        let less = plan.bytes().saturating_sub(saved);
        let fits = if less <= size.left_bytes {
            "fits"
        } else {
            "does not fit either"
        };
        ways.push(format!("as Q4_0 it takes about {} and {fits}", mebibytes(less)));
    }
    let others = Board::all().unwrap_or_default();
    let larger: Vec<String> = others
        .iter()
        .filter(|other| other.id != board.id && !other.compatible.is_empty())
        .filter_map(|other| {
            let mib = other
                .memory
                .mib
                .iter()
                .find(|&&mib| Memory::left_of(mib) >= plan.bytes())?;
            Some(format!("{} ({mib} MiB)", other.id))
        })
        .collect();
    if !larger.is_empty() {
        ways.push(format!("boards that have the room: {}", larger.join(", ")));
    }
    ways.join("; ")
}

/// Bytes and elements of the matrices, which is what quantisation makes smaller.
fn matrices(header: &Header) -> (u64, u64) {
    let matrices = header.tensors.iter().filter(|tensor| tensor.dimensions() > 1);
    matrices.fold((0_u64, 0_u64), |(bytes, elements), tensor| {
        let count = tensor
            .shape
            .iter()
            .fold(1_u64, |product, &length| product.saturating_mul(length));
        (bytes.saturating_add(tensor.bytes), elements.saturating_add(count))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::gguf;

    fn model() -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), gguf(&[])).unwrap();
        file
    }

    #[test]
    fn what_fits_and_what_does_not() {
        let board = Board::find("raspberry-pi-4").unwrap();
        let (model, mut config) = (model(), Config::default());
        recommend(&board, &mut config, |_| false);
        assert_eq!(config.model.threads, 4);
        let forecast = Forecast::of(&board, &config, model.path(), None).unwrap();
        assert!(forecast.sizes.iter().all(|size| size.fits) && forecast.instead.is_none());
        let findings = forecast.findings(&board);
        assert_eq!(findings[1].state, State::Ok, "{findings:?}");
        assert!(findings[2].says.contains("27 %"), "{findings:?}");

        let forecast = Forecast::of(&board, &config, model.path(), Some(136)).unwrap();
        let finding = &forecast.findings(&board)[1];
        assert_eq!(finding.state, State::Fail);
        let hint = finding.hint.as_deref().unwrap();
        assert!(hint.contains("orange-pi-5 (4096 MiB)"), "{hint}");
    }

    #[test]
    fn what_somebody_set_stays() {
        let board = Board::find("raspberry-pi-zero-2-w").unwrap();
        let mut config = Config::default();
        recommend(&board, &mut config, |key| key == "model.n_ctx");
        assert_eq!(
            (config.model.n_ctx, config.model.cache_type_k.as_str()),
            (2048, "q8_0")
        );
    }

    #[test]
    fn a_bandwidth_that_nobody_knows_makes_no_speed() {
        let board = Board::find("raspberry-pi-zero-2-w").unwrap();
        let forecast = Forecast::of(&board, &Config::default(), model().path(), None).unwrap();
        assert_eq!(forecast.most_tokens_per_second, None);
        assert!(forecast.findings(&board)[2].says.starts_with("unknown"));
    }
}
