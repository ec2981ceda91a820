//! Greedy answers of several prompts at once, with a key-value cache.

use candle_core::Result;

use crate::batch::Batch;
use crate::data::Prompt;
use crate::model::Model;
use crate::model::ops::with_elements;

/// When an answer ends.
#[derive(Debug, Clone)]
pub struct Stop<'a> {
    /// Tokens that end an answer; they are not part of it.
    pub eos: &'a [u32],
    /// The most tokens of an answer.
    pub max_new_tokens: usize,
}

impl<'a> Stop<'a> {
    /// At most `wanted` tokens, and no more than fit behind the longest of the prompts into a model that knows
    /// `longest` positions.
    pub fn within(eos: &'a [u32], wanted: usize, longest: usize, prompts: &[Prompt]) -> Self {
        let prompt = prompts.iter().map(|prompt| prompt.ids.len()).max().unwrap_or(0);
        Self {
            eos,
            max_new_tokens: wanted.min(longest.saturating_sub(prompt)),
        }
    }
}

/// The most probable answer to each prompt, token by token. A prompt must have at least one token.
pub fn greedy(model: &Model, prompts: &[&[u32]], stop: &Stop<'_>) -> Result<Vec<Vec<u32>>> {
    let config = model.config();
    let mut answers = vec![Vec::new(); prompts.len()];
    let mut cache = model.cache(prompts.len())?;
    // The prompts that are still being answered, in the order of the cache.
    let mut open: Vec<usize> = (0..prompts.len()).collect();
    let mut batch = Batch::unlabelled(prompts.iter().copied());
    for _ in 0..stop.max_new_tokens {
        if open.is_empty() {
            break;
        }
        let hidden = model.hidden_cached(&batch, &mut cache)?;
        let starts = batch.starts();
        let last: Vec<u32> = starts.windows(2).map(|w| (w[1] - 1) as u32).collect();
        let rows = candle_core::Tensor::from_vec(last, open.len(), hidden.device())?;
        let logits = model.logits(&hidden.index_select(&rows, 0)?)?;
        let next = with_elements::<f32, _>(&logits, "greedy", |logits| {
            Ok(logits
                .chunks_exact(config.vocab_size)
                .map(largest)
                .collect::<Vec<u32>>())
        })?;
        let keep: Vec<bool> = next.iter().map(|token| !stop.eos.contains(token)).collect();
        cache.retain(&keep);
        let (mut still, mut tokens) = (Vec::new(), Vec::new());
        for ((prompt, token), _) in open.iter().zip(next).zip(&keep).filter(|(_, keep)| **keep) {
            answers[*prompt].push(token);
            still.push(*prompt);
            tokens.push([token]);
        }
        open = still;
        batch = Batch::unlabelled(tokens.iter().map(<[u32; 1]>::as_slice));
    }
    Ok(answers)
}

/// The place of the largest number, the first one of equals.
fn largest(logits: &[f32]) -> u32 {
    let start = (0, f32::NEG_INFINITY);
    logits
        .iter()
        .enumerate()
        .fold(start, |best, (i, x)| if *x > best.1 { (i, *x) } else { best })
        .0 as u32
}
