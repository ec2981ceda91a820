//! The model: is the file whole, does it fit into the memory, is it the one that was meant?

use std::path::Path;

use super::{Finding, State};
use crate::config::Config;
use crate::model::{self, Header};
use crate::plan::{Plan, Settings, available, mebibytes};
use crate::store::{Served, Store, StoreError};

/// File, memory and signature.
pub fn findings(config: &Config, root: &Path, daemon_runs: bool) -> Vec<Finding> {
    const WHAT: &str = "model";
    let served = match served(config) {
        Ok(Some(served)) => served,
        Ok(None) => {
            return vec![
                Finding::new(WHAT, State::Fail, "no model is named, and none is installed")
                    .hint("`pipit model install`, --model FILE.gguf, or [model] path in the configuration"),
            ];
        }
        Err(error) => return vec![Finding::of_error(WHAT, &error)],
    };
    match model::inspect(&served.path) {
        Err(error) => vec![Finding::of_error(WHAT, &error)],
        Ok(header) => vec![
            file(&served.path, &header, config),
            memory(config, &header, root, daemon_runs),
            signature(config, &served),
        ],
    }
}

/// The model that `pipit serve` would serve.
///
/// # Errors
/// A state folder that is not known, an installed model that cannot be read.
pub fn served(config: &Config) -> Result<Option<Served>, StoreError> {
    if config.model.path.is_some() {
        return Served::of(config, Path::new(""));
    }
    Served::of(config, &config.state_dir()?)
}

fn file(path: &Path, header: &Header, config: &Config) -> Finding {
    const WHAT: &str = "model";
    let says = format!(
        "{}: {}, {}, {} in {} tensors, trained for {} tokens",
        path.display(),
        header.architecture,
        header.quantisation,
        mebibytes(header.bytes),
        header.tensors.len(),
        header.context_trained
    );
    if header.context_trained > 0 && u64::from(config.model.n_ctx) > header.context_trained {
        return Finding::new(WHAT, State::Info, says).hint(format!(
            "[model] n_ctx = {} is more than one request can use; together they can",
            config.model.n_ctx
        ));
    }
    Finding::new(WHAT, State::Ok, says)
}

/// The plan, as text; [`plan`] has it as data.
fn memory(config: &Config, header: &Header, root: &Path, daemon_runs: bool) -> Finding {
    const WHAT: &str = "memory";
    let plan = match Settings::of(config) {
        Ok(settings) => Plan::of(header, &settings),
        Err(error) => return Finding::of_error(WHAT, &error),
    };
    let available = available(root, config.model.memory_bytes);
    let Some(limit) = &available else {
        return Finding::new(
            WHAT,
            State::Info,
            format!(
                "{} needed; this system does not say what is available",
                mebibytes(plan.bytes())
            ),
        );
    };
    let says = format!(
        "{} needed, {} available ({})",
        mebibytes(plan.bytes()),
        mebibytes(limit.bytes),
        limit.by
    );
    match plan.check(available.as_ref()) {
        Err(_) if daemon_runs => Finding::new(
            WHAT,
            State::Info,
            format!("{says}; a daemon runs, and what its model takes is no longer available"),
        ),
        Err(error) => Finding {
            says,
            ..Finding::of_error(WHAT, &error)
        },
        Ok(()) if !plan.unknown.is_empty() => Finding::new(
            WHAT,
            State::Warn,
            format!("at least {says}: {}", plan.unknown.join("; ")),
        )
        .hint("look at worker_resident_bytes in the metrics before you rely on it"),
        Ok(()) => Finding::new(WHAT, State::Ok, says),
    }
}

/// The plan of a configuration's model; `None` where there is none to be made.
pub fn plan(config: &Config) -> Option<Plan> {
    let header = model::inspect(&served(config).ok()??.path).ok()?;
    Some(Plan::of(&header, &Settings::of(config).ok()?))
}

fn signature(config: &Config, served: &Served) -> Finding {
    const WHAT: &str = "signature";
    let (Some(id), Ok(state)) = (&served.id, config.state_dir()) else {
        return Finding::new(WHAT, State::Info, "a file that the configuration names has none")
            .hint("`pipit model install` takes signed models only");
    };
    match Store::of(&state).check_signature(id, config) {
        Ok(true) => Finding::new(
            WHAT,
            State::Ok,
            format!("{id} is signed by a key that is trusted"),
        ),
        Ok(false) => Finding::new(
            WHAT,
            State::Warn,
            format!("{id} is not signed, and that is allowed"),
        )
        .hint("[install] trusted_keys, and allow_unsigned = false"),
        Err(error) => Finding::of_error(WHAT, &error),
    }
}

/// The file's hash, against the one that was expected; hexadecimal digits of either case.
///
/// # Errors
/// I/O errors.
pub fn sha256(path: &Path, expected: Option<&str>) -> std::io::Result<(Finding, bool)> {
    const WHAT: &str = "sha256";
    let found = model::sha256(path)?;
    Ok(match expected {
        Some(expected) if !expected.eq_ignore_ascii_case(&found) => (
            Finding::new(
                WHAT,
                State::Fail,
                format!("{found}, expected {}", expected.to_ascii_lowercase()),
            )
            .hint("the file is another one, or damaged: copy it again"),
            false,
        ),
        Some(_) => (
            Finding::new(WHAT, State::Ok, format!("{found}, as expected")),
            true,
        ),
        None => (Finding::new(WHAT, State::Info, found), true),
    })
}
