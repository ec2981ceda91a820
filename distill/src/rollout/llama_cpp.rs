//! A GGUF file goes on with sequences, in llama.cpp: as it will on the board, with activations rounded as there.

use std::collections::BTreeSet;
use std::num::NonZeroU32;

use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::token::LlamaToken;
use pipit_convert::llama_cpp::{LlamaCppError, backend};

use super::Decode;

/// Tokens that go through the model at a time.
const BATCH: usize = 512;

/// Why llama.cpp does not go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// It cannot be started.
    #[error(transparent)]
    Start(#[from] LlamaCppError),
    /// It has no memory for the sequences, or refuses the model.
    #[error("llama.cpp gives no context for {sequences} sequences of {tokens} tokens: {why}")]
    Context {
        /// The sequences that are open at one time.
        sequences: usize,
        /// The tokens of each.
        tokens: usize,
        /// What it said.
        why: String,
    },
    /// It fails while it computes.
    #[error("llama.cpp cannot go on: {0}")]
    Compute(String),
}

/// A GGUF model with its open sequences.
pub struct LlamaCpp<'m> {
    context: LlamaContext<'m>,
    vocab_size: usize,
    longest: usize,
    /// The tokens of every open sequence so far, and its number in llama.cpp, in their order.
    open: Vec<(i32, i32)>,
    /// Numbers that no sequence has. The lowest are taken first, so that those in use follow one another.
    free: BTreeSet<i32>,
}

impl std::fmt::Debug for LlamaCpp<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LlamaCpp")
            .field("open", &self.open)
            .finish_non_exhaustive()
    }
}

impl<'m> LlamaCpp<'m> {
    /// Room for `width` sequences of at most `longest` tokens each.
    pub fn new(model: &'m LlamaModel, longest: usize, width: usize) -> Result<Self, DecodeError> {
        let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        // As many as our own operations use: llama.cpp's wait for each other by spinning, and slow down where they are more
        // than the cores.
        let threads = i32::try_from(rayon::current_num_threads()).unwrap_or(1);
        let params = LlamaContextParams::default()
            .with_n_ctx(NonZeroU32::new(number(longest.saturating_mul(width))))
            .with_n_batch(number(BATCH.max(width)))
            .with_n_ubatch(number(BATCH.max(width)))
            .with_n_seq_max(number(width))
            .with_n_threads(threads)
            .with_n_threads_batch(threads);
        let context = model
            .new_context(backend()?, params)
            .map_err(|e| DecodeError::Context {
                sequences: width,
                tokens: longest,
                why: e.to_string(),
            })?;
        Ok(Self {
            context,
            vocab_size: usize::try_from(model.n_vocab()).unwrap_or(0),
            longest,
            open: Vec::new(),
            free: (0..i32::try_from(width).unwrap_or(i32::MAX)).collect(),
        })
    }

    /// Computes (token, position, sequence, whether its logits are wanted), and appends the wanted ones.
    fn compute(
        &mut self,
        tokens: &[(u32, i32, i32, bool)],
        logits: &mut Vec<f32>,
    ) -> Result<(), DecodeError> {
        for part in tokens.chunks(BATCH.max(1)) {
            // llama.cpp computes sequences together whose numbers follow one another in the batch, and no others.
            let mut order: Vec<usize> = (0..part.len()).collect();
            order.sort_by_key(|at| part[*at].2);
            let mut places = vec![0; part.len()];
            let mut batch = LlamaBatch::new(part.len(), 1);
            for (place, at) in order.into_iter().enumerate() {
                places[at] = place as i32;
                let (token, position, sequence, wanted) = &part[at];
                batch
                    .add(LlamaToken(*token as i32), *position, &[*sequence], *wanted)
                    .map_err(|e| DecodeError::Compute(e.to_string()))?;
            }
            let done = self.context.decode(&mut batch);
            done.map_err(|e| DecodeError::Compute(e.to_string()))?;
            for (place, _) in places.into_iter().zip(part).filter(|(_, token)| token.3) {
                logits.extend_from_slice(self.context.get_logits_ith(place));
            }
        }
        Ok(())
    }
}

impl Decode for LlamaCpp<'_> {
    type Error = DecodeError;

    fn longest(&self) -> usize {
        self.longest
    }

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Its kernels take four rows at a time, and the rest of them one by one: every place should be taken.
    fn worth_opening(&self, _width: usize) -> usize {
        1
    }

    fn open(&mut self, prompts: &[&[u32]], copies: usize) -> Result<Vec<f32>, DecodeError> {
        let full = || DecodeError::Compute("more sequences are opened than there is room for".into());
        let (mut tokens, mut logits) = (Vec::new(), Vec::new());
        let mut forks = Vec::new();
        for prompt in prompts {
            let first = self.free.pop_first().ok_or_else(full)?;
            for (position, token) in prompt.iter().enumerate() {
                tokens.push((*token, position as i32, first, position + 1 == prompt.len()));
            }
            self.open.push((prompt.len() as i32, first));
            for _ in 1..copies {
                let copy = self.free.pop_first().ok_or_else(full)?;
                forks.push((first, copy));
                self.open.push((prompt.len() as i32, copy));
            }
        }
        self.compute(&tokens, &mut logits)?;
        for (first, copy) in forks {
            self.context.copy_cache(first, copy, -1);
        }
        Ok(logits)
    }

    fn retain(&mut self, keep: &[bool]) -> Result<(), DecodeError> {
        let mut kept = Vec::with_capacity(self.open.len());
        for (sequence, keep) in std::mem::take(&mut self.open).into_iter().zip(keep) {
            if *keep {
                kept.push(sequence);
                continue;
            }
            let number = u32::try_from(sequence.1).unwrap_or(0);
            self.context
                .clear_kv_cache_seq(Some(number), None, None)
                .map_err(|e| DecodeError::Compute(e.to_string()))?;
            self.free.insert(sequence.1);
        }
        self.open = kept;
        Ok(())
    }

    fn next(&mut self, tokens: &[u32]) -> Result<Vec<f32>, DecodeError> {
        let next: Vec<_> = tokens
            .iter()
            .zip(&mut self.open)
            .map(|(token, (length, sequence))| {
                let position = *length;
                *length += 1;
                (*token, position, *sequence, true)
            })
            .collect();
        let mut logits = Vec::with_capacity(next.len() * self.vocab_size);
        self.compute(&next, &mut logits)?;
        Ok(logits)
    }
}
