//! The sampler: how the next token is chosen.
//!
//! In: numbers from the request, resolved against the device's defaults. Out: a token for each row of logits. Where
//! there is something to draw, it is a chain of llama.cpp's samplers in llama.cpp's own order (penalties, top_k, top_p,
//! min_p, temperature, then a draw with the request's seed).

use llama_cpp_2::sampling::LlamaSampler;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_2::token::data::LlamaTokenData;
use llama_cpp_2::token::data_array::LlamaTokenDataArray;
use llguidance::toktrie::SimpleVob;
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
    /// Divides the logits of tokens seen before; 1 is off.
    pub repeat_penalty: f32,
    /// Subtracted once for each time that a token was seen; 0 is off.
    pub frequency_penalty: f32,
    /// Subtracted from tokens seen at all; 0 is off.
    pub presence_penalty: f32,
    /// How many of the last tokens count as seen, those of the prompt too; -1 is all.
    pub repeat_last_n: i32,
    /// Of the draw.
    pub seed: u32,
}

/// Chooses tokens for one answer.
#[derive(Debug)]
pub struct Sampler {
    /// `None` is the best token, with nothing before it that changes logits.
    chain: Option<LlamaSampler>,
}

impl Sampler {
    /// A sampler that has seen `prompt`; `context` is what -1 means for `repeat_last_n`.
    pub fn new(settings: &Settings, n_vocab: i32, context: u32, prompt: &[LlamaToken]) -> Self {
        let mut chain = Vec::new();
        let window = match settings.repeat_last_n {
            ..0 => i32::try_from(context).unwrap_or(i32::MAX),
            window => window,
        };
        let penalised = window > 0
            && (settings.repeat_penalty != 1.0
                || settings.frequency_penalty != 0.0
                || settings.presence_penalty != 0.0);
        if penalised {
            let seen = &prompt[prompt.len().saturating_sub(window.unsigned_abs() as usize)..];
            chain.push(
                LlamaSampler::penalties(
                    n_vocab,
                    window,
                    settings.repeat_penalty,
                    settings.frequency_penalty,
                    settings.presence_penalty,
                )
                .with_tokens(seen),
            );
        }
        if settings.temperature <= 0.0 {
            if chain.is_empty() {
                return Self { chain: None };
            }
            chain.push(LlamaSampler::greedy());
        } else {
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
        }
        Self {
            chain: Some(LlamaSampler::chain(chain, true)),
        }
    }

    /// The next token, from its logits, among `allowed`; `None` when nothing is. `candidates` is room for all tokens, which
    /// samplers share: what it holds does not matter.
    pub fn next(
        &mut self,
        logits: &[f32],
        allowed: Option<&SimpleVob>,
        candidates: &mut Vec<LlamaTokenData>,
    ) -> Option<LlamaToken> {
        let token = match &mut self.chain {
            None => best(logits, allowed),
            Some(chain) => {
                candidates.clear();
                let candidate =
                    |token: usize, logit: f32| LlamaTokenData::new(LlamaToken(token as i32), logit, 0.0);
                match allowed {
                    None => candidates.extend(
                        logits
                            .iter()
                            .enumerate()
                            .map(|(token, &logit)| candidate(token, logit)),
                    ),
                    Some(allowed) => allowed.iter_set_entries(|token| {
                        if let Some(&logit) = logits.get(token) {
                            candidates.push(candidate(token, logit));
                        }
                    }),
                }
                if candidates.is_empty() {
                    return None;
                }
                let mut array = LlamaTokenDataArray::new(std::mem::take(candidates), false);
                chain.apply(&mut array);
                let selected = array.selected_token();
                *candidates = array.data;
                selected
            }
        }?;
        self.saw(token);
        Some(token)
    }

    /// Takes note of a token that was not drawn here: one that the schema forced.
    pub fn saw(&mut self, token: LlamaToken) {
        if let Some(chain) = &mut self.chain {
            chain.accept(token);
        }
    }
}

/// The token with the largest logit; the first of equals, as llama.cpp's greedy sampler has it.
fn best(logits: &[f32], allowed: Option<&SimpleVob>) -> Option<LlamaToken> {
    let mut best: Option<(usize, f32)> = None;
    let mut look = |token: usize, logit: f32| {
        if best.is_none_or(|(_, most)| logit > most) {
            best = Some((token, logit));
        }
    };
    match allowed {
        None => {
            // Eight running maxima let the compiler use vectors: a vocabulary has up to 262,144 rows.
            let most = maximum(logits);
            let at = logits.iter().position(|&logit| logit == most)?;
            look(at, most);
        }
        Some(allowed) => allowed.iter_set_entries(|token| {
            if let Some(&logit) = logits.get(token) {
                look(token, logit);
            }
        }),
    }
    best.map(|(token, _)| LlamaToken(token as i32))
}

fn maximum(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 8];
    let chunks = values.chunks_exact(8);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = if value > *lane { value } else { *lane };
        }
    }
    lanes
        .iter()
        .chain(rest)
        .copied()
        .fold(f32::NEG_INFINITY, f32::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_of_all_and_of_the_allowed() {
        let mut logits = vec![0.0_f32; 21];
        logits[3] = 2.0;
        logits[17] = 5.0;
        logits[20] = 5.0;
        assert_eq!(best(&logits, None), Some(LlamaToken(17)));
        let mut allowed = SimpleVob::alloc(32);
        assert_eq!(best(&logits, Some(&allowed)), None);
        allowed.allow_token(3);
        allowed.allow_token(30);
        assert_eq!(best(&logits, Some(&allowed)), Some(LlamaToken(3)));
        assert_eq!(best(&[f32::NAN, 1.0], None), Some(LlamaToken(1)));
        assert_eq!(best(&[], None), None);
    }
}
