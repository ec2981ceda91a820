//! The sampler: how the next token is chosen.
//!
//! A crate of its own, because it is built for speed: a vocabulary has up to 262,144 rows, and every token waits for the loops
//! over them. The rest of the daemon is built to be small.
//!
//! In: numbers from the request, resolved against the device's defaults. Out: a token for each row of logits. Where
//! there is something to draw, it is a chain of llama.cpp's samplers in llama.cpp's own order (penalties, top_k, top_p,
//! min_p, temperature, then a draw with the request's seed).

use llama_cpp_2::sampling::LlamaSampler;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_2::token::data::LlamaTokenData;
use llama_cpp_2::token::data_array::LlamaTokenDataArray;
use llguidance::toktrie::SimpleVob;
use pulp::{Arch, Simd, WithSimd};
use serde::{Deserialize, Serialize};

/// Logits that are searched at a time.
const PART: usize = 1024;

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
    let token = |token: usize| LlamaToken(token as i32);
    let Some(allowed) = allowed else {
        return largest(logits).map(|(at, _)| token(at));
    };
    let mut best: Option<(usize, f32)> = None;
    allowed.iter_set_entries(|at| {
        if let Some(&logit) = logits.get(at)
            && best.is_none_or(|(_, most)| logit > most)
        {
            best = Some((at, logit));
        }
    });
    best.map(|(at, _)| token(at))
}

/// The first of the largest numbers, and its place.
fn largest(logits: &[f32]) -> Option<(usize, f32)> {
    let arch = Arch::new();
    let mut best = (0, f32::NEG_INFINITY);
    for (part, logits) in logits.chunks(PART).enumerate() {
        let most = arch.dispatch(Maximum(logits));
        if most > best.1 {
            best = (part * PART, most);
        }
    }
    let (start, most) = best;
    let within = logits.iter().skip(start).position(|&logit| logit == most)?;
    Some((start + within, most))
}

/// The largest of some numbers, by vectors.
struct Maximum<'a>(&'a [f32]);

impl WithSimd for Maximum<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        let (vectors, rest) = S::as_simd_f32s(self.0);
        let mut vectors = vectors.chunks_exact(2);
        // What is no number is not larger than anything.
        let larger = |a: S::f32s, b: S::f32s| simd.select_f32s(simd.greater_than_f32s(a, b), a, b);
        // Two that do not wait for each other.
        let mut most = [simd.splat_f32s(f32::NEG_INFINITY); 2];
        for pair in &mut vectors {
            most = [larger(pair[0], most[0]), larger(pair[1], most[1])];
        }
        let last = vectors.remainder().iter();
        let most = last.fold(larger(most[0], most[1]), |most, last| larger(*last, most));
        rest.iter().copied().fold(simd.reduce_max_f32s(most), f32::max)
    }
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

    #[test]
    fn the_best_wherever_it_is() {
        let mut logits: Vec<f32> = (0..2 * PART + 77).map(|i| (i as f32).sin()).collect();
        for at in 0..logits.len() {
            let own = std::mem::replace(&mut logits[at], 3.0);
            // An equal one behind it, and what is no number, change nothing.
            let behind = (at + 1 < logits.len()).then(|| std::mem::replace(&mut logits[at + 1], 3.0));
            let first = std::mem::replace(&mut logits[0], if at == 0 { 3.0 } else { f32::NAN });
            assert_eq!(largest(&logits), Some((at, 3.0)));
            logits[0] = first;
            if let Some(behind) = behind {
                logits[at + 1] = behind;
            }
            logits[at] = own;
        }
        assert_eq!(largest(&[f32::NEG_INFINITY; 40]), Some((0, f32::NEG_INFINITY)));
        assert_eq!(largest(&[f32::NAN; 40]), None);
    }
}
