//! Advice: which settings would fit.
//!
//! In: the model, settings that do not fit, bytes that are available. Out: a line for the person who sets them. Every
//! suggestion was computed with the same plan.

use super::{Plan, Settings, mebibytes};
use crate::model::{GgmlType, Header};

/// A context below this is of little use.
const LEAST_CONTEXT: u32 = 256;

pub(super) fn advice(header: &Header, settings: &Settings, available: u64) -> String {
    let bytes = |settings: &Settings| Plan::of(header, settings).bytes();
    let fits = |settings: &Settings| bytes(settings) <= available;
    let eight_bits = GgmlType::of_cache("q8_0").unwrap_or(GgmlType::F16);
    let with_context = |n_ctx| Settings {
        n_ctx,
        ..settings.clone()
    };
    let with_slots = |slots: u32| Settings {
        slots,
        sequences: settings
            .sequences
            .saturating_sub(settings.slots.saturating_sub(slots)),
        ..settings.clone()
    };
    let quantised = Settings {
        cache_type_k: eight_bits,
        cache_type_v: eight_bits,
        ..settings.clone()
    };
    let smaller_cache = bytes(&quantised) < bytes(settings);

    let mut ways = Vec::new();
    if let Some(n_ctx) = largest(LEAST_CONTEXT, settings.n_ctx, 256, |n_ctx| {
        fits(&with_context(n_ctx))
    }) {
        ways.push(format!("[model] n_ctx = {n_ctx} (--ctx)"));
    }
    if smaller_cache && fits(&quantised) {
        ways.push("cache_type_k = cache_type_v = \"q8_0\"".to_owned());
    }
    if let Some(slots) = largest(1, settings.slots, 1, |slots| fits(&with_slots(slots))) {
        ways.push(format!("slots = {slots}"));
    }
    let needed = bytes(&Settings {
        prefixes: 0,
        ..settings.clone()
    });
    if settings.prefixes > 0 && needed <= available {
        // Whole mebibytes are easier to read.
        ways.push(format!(
            "[prefix] ram_bytes = {}",
            (available - needed) >> 20 << 20
        ));
    }
    if !ways.is_empty() {
        return format!("it fits with {}", ways.join(", or "));
    }
    let least = |n_ctx| Settings {
        n_ctx,
        prefixes: 0,
        cache_type_k: if smaller_cache {
            eight_bits
        } else {
            settings.cache_type_k
        },
        cache_type_v: if smaller_cache {
            eight_bits
        } else {
            settings.cache_type_v
        },
        ..with_slots(1)
    };
    let mut together = vec!["slots = 1"];
    if settings.prefixes > 0 {
        together.push("[prefix] ram_bytes = 0");
    }
    if smaller_cache {
        together.push("cache_type_k = cache_type_v = \"q8_0\"");
    }
    match largest(LEAST_CONTEXT, settings.n_ctx.max(512), 256, |n_ctx| {
        fits(&least(n_ctx))
    }) {
        Some(n_ctx) => format!(
            "it fits with {} and n_ctx = {n_ctx} together",
            together.join(", ")
        ),
        None => format!(
            "no setting makes it fit, the least is {}: take a smaller model, or one quantised to fewer bits \
             (`pipit-convert model -t`)",
            mebibytes(bytes(&least(LEAST_CONTEXT)))
        ),
    }
}

/// The largest of `least`, `least + step`, … below `limit` that fits; what fits still fits when it is smaller.
fn largest(least: u32, limit: u32, step: u32, fits: impl Fn(u32) -> bool) -> Option<u32> {
    let count = limit.checked_sub(least)?.div_ceil(step);
    let value = |index: u32| least + index * step;
    let (mut known, mut beyond) = (None, count);
    let mut below = 0;
    while below < beyond {
        let middle = below + (beyond - below) / 2;
        if fits(value(middle)) {
            known = Some(value(middle));
            below = middle + 1;
        } else {
            beyond = middle;
        }
    }
    known
}
