//! The sampler: how the next token is chosen.
//!
//! In: numbers from the request, resolved against the device's defaults. Out: a chain of llama.cpp's samplers in
//! llama.cpp's own order (top_k, top_p, min_p, temperature, then a draw with the request's seed).

use llama_cpp_2::sampling::LlamaSampler;
use serde::{Deserialize, Serialize};

/// Resolved settings.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// 0 is greedy: the best token, always.
    pub temperature: f32,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 keeps all.
    pub top_k: i32,
    /// 0 keeps all.
    pub min_p: f32,
    /// Of the draw.
    pub seed: u32,
}

/// Builds the chain.
pub fn build(settings: &Settings) -> LlamaSampler {
    if settings.temperature <= 0.0 {
        return LlamaSampler::chain([LlamaSampler::greedy()], true);
    }
    let mut chain = Vec::new();
    if settings.top_k > 0 {
        chain.push(LlamaSampler::top_k(settings.top_k));
    }
    if settings.top_p < 1.0 {
        chain.push(LlamaSampler::top_p(settings.top_p, 1));
    }
    if settings.min_p > 0.0 {
        chain.push(LlamaSampler::min_p(settings.min_p, 1));
    }
    chain.push(LlamaSampler::temp(settings.temperature));
    chain.push(LlamaSampler::dist(settings.seed));
    LlamaSampler::chain(chain, true)
}
