//! The benchmark: how fast a model is on this machine, and how fast the memory lets it be.
//!
//! In: a loaded model. Out: tokens a second of prefill and of decode, measured as llama-bench does (random tokens, one
//! sequence, an empty context before each repetition), and the bandwidth of the memory. Decode reads every weight once
//! for each token, and the KV of all tokens before it; so bandwidth divided by those bytes is the speed that no kernel
//! can beat (Williams et al., 2009, the roofline model). A share far below the usual 0.6 to 0.7 says that kernels are
//! missing, threads are too many, or something else has the cores.

use std::hint::black_box;
use std::time::Instant;

use llama_cpp_2::token::LlamaToken;
use serde::Serialize;

use crate::engine::llama::{Llama, N_BATCH};
use crate::model::{GgmlType, Header};

/// Buffer of the bandwidth measurement: larger than any cache of a CPU that runs small models.
const BUFFER_BYTES: usize = 256 << 20;

/// What is measured.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Task {
    /// Tokens of prefill.
    pub prompt: usize,
    /// Tokens of decode.
    pub generate: usize,
    /// Repetitions; the median counts.
    pub repetitions: usize,
}

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Measured {
    /// Tokens a second of prefill, in batches of 512.
    pub prefill_per_second: f64,
    /// Tokens a second of decode.
    pub decode_per_second: f64,
    /// Bytes that one token of decode reads: weights, and the KV cache at half of the task.
    pub bytes_per_token: u64,
    /// Bytes a second that all threads together read from memory.
    pub bandwidth: f64,
    /// Tokens a second that the bandwidth allows.
    pub bound_per_second: f64,
    /// Decode as a share of that.
    pub share: f64,
}

/// Runs the task.
///
/// # Errors
/// What llama.cpp says when it cannot compute a batch.
pub fn measure(
    llama: &mut Llama,
    header: &Header,
    kv_token_bytes: u64,
    task: Task,
) -> Result<Measured, String> {
    let vocabulary = llama.model().n_vocab().max(1);
    let token = |at: usize| LlamaToken((at as i32).wrapping_mul(7919).rem_euclid(vocabulary));
    // Once without counting: pages of the file, kernels' own buffers.
    run(llama, &[token(0), token(1)], 1)?;
    let (mut prefills, mut decodes) = (Vec::new(), Vec::new());
    for repetition in 0..task.repetitions.max(1) {
        let prompt: Vec<LlamaToken> = (0..task.prompt).map(|at| token(at + repetition)).collect();
        if !prompt.is_empty() {
            let seconds = run(llama, &prompt, N_BATCH as usize)?;
            prefills.push(prompt.len() as f64 / seconds);
        }
        let generated: Vec<LlamaToken> = (0..task.generate).map(|at| token(at * 3 + repetition)).collect();
        if !generated.is_empty() {
            let seconds = run(llama, &generated, 1)?;
            decodes.push(generated.len() as f64 / seconds);
        }
    }
    let bandwidth = bandwidth(llama.info().threads as usize);
    let bytes_per_token = weights_per_token(header) + kv_token_bytes * task.generate as u64 / 2;
    let decode_per_second = median(decodes);
    let bound_per_second = bandwidth / bytes_per_token.max(1) as f64;
    Ok(Measured {
        prefill_per_second: median(prefills),
        decode_per_second,
        bytes_per_token,
        bandwidth,
        bound_per_second,
        share: decode_per_second / bound_per_second,
    })
}

/// Computes `tokens` from an empty context in batches of at most `batch`; returns seconds.
fn run(llama: &mut Llama, tokens: &[LlamaToken], batch: usize) -> Result<f64, String> {
    llama.forget(0);
    let started = Instant::now();
    for (chunk, tokens_of_chunk) in tokens.chunks(batch).enumerate() {
        llama.clear();
        for (at, &token) in tokens_of_chunk.iter().enumerate() {
            let position = chunk * batch + at;
            let last = at + 1 == tokens_of_chunk.len();
            llama
                .add(token, position, 0, last)
                .ok_or("the batch is full".to_owned())?;
        }
        llama.decode().map_err(|error| error.to_string())?;
        // llama.cpp may compute later than it returns: logits are there when it has.
        black_box(llama.logits(tokens_of_chunk.len() - 1));
    }
    Ok(started.elapsed().as_secs_f64())
}

/// Bytes of weights that every token reads: all, but of the embedding table one row, unless it is the output head as
/// well.
pub fn weights_per_token(header: &Header) -> u64 {
    let tied = !header.tensors.iter().any(|tensor| tensor.name == "output.weight");
    header
        .tensors
        .iter()
        .filter(|tensor| tied || tensor.name != "token_embd.weight")
        .map(|tensor| tensor.bytes)
        .sum()
}

/// Bytes of the KV cache that one token of context takes: decode reads them for every token behind it.
pub fn kv_per_token(header: &Header, cache_k: GgmlType, cache_v: GgmlType) -> u64 {
    let layers = header.layers.layers.iter();
    layers
        .map(|layer| cache_k.bytes(layer.k) + cache_v.bytes(layer.v))
        .sum()
}

/// Bytes a second that `threads` threads read from memory together: the best of five passes. The reading is memchr's
/// search for a byte that is not there, which takes less time than the memory does, in a debug build as well.
pub fn bandwidth(threads: usize) -> f64 {
    let threads = threads.max(1);
    let bytes = BUFFER_BYTES / threads;
    // Written once, so that every page is there.
    let buffers: Vec<Vec<u8>> = (0..threads).map(|_| vec![1; bytes]).collect();
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let started = Instant::now();
        std::thread::scope(|scope| {
            for buffer in &buffers {
                scope.spawn(move || black_box(memchr::memchr(2, black_box(buffer))));
            }
        });
        best = best.min(started.elapsed().as_secs_f64());
    }
    (bytes * threads) as f64 / best
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Tensor;

    #[test]
    fn a_tied_head_reads_the_embedding_table() {
        let tensor = |name: &str, bytes| Tensor {
            name: name.to_owned(),
            kind: GgmlType::F32,
            shape: [1, 1, 1, 1],
            bytes,
        };
        let mut header = Header {
            tensors: vec![tensor("token_embd.weight", 100), tensor("blk.0.attn_q.weight", 7)],
            ..Header::default()
        };
        assert_eq!(weights_per_token(&header), 107);
        header.tensors.push(tensor("output.weight", 50));
        assert_eq!(weights_per_token(&header), 57);
    }

    #[test]
    fn medians() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(Vec::new()), 0.0);
    }
}
