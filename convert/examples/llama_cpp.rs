//! What llama.cpp makes of a GGUF file, for the scripts in tests/references: tokens, and logits as float32.
//!
//! `llama_cpp MODEL.gguf TEXTS.json LOGITS.bin` reads a JSON array of texts and prints a JSON array with the
//! tokens of each (special tokens in the text are recognised, none are added). For the first `LOGITS_OF`
//! texts, the logits after every token go to LOGITS.bin, one text after the other. The KV cache is f32 and flash
//! attention is off, so that nothing is rounded that need not be.

use std::io::Write;
use std::num::NonZeroU32;

use anyhow::{Context, bail};
use llama_cpp_2::context::params::{KvCacheType, LlamaContextParams};
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;

const LOGITS_OF: usize = 12;

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, texts, logits] = args.as_slice() else {
        bail!("usage: llama_cpp MODEL.gguf TEXTS.json LOGITS.bin");
    };
    let texts: Vec<String> = serde_json::from_str(&std::fs::read_to_string(texts)?)?;
    let mut backend = LlamaBackend::init()?;
    backend.void_logs();
    let model = LlamaModel::load_from_file(&backend, model, &LlamaModelParams::default())
        .with_context(|| format!("llama.cpp cannot load {model}"))?;
    let mut out = std::io::BufWriter::new(std::fs::File::create(logits)?);
    let mut all = Vec::new();
    for (at, text) in texts.iter().enumerate() {
        let tokens = model.vocab().tokenize(text.as_bytes(), false, true);
        if at < LOGITS_OF {
            let params = LlamaContextParams::default()
                .with_n_ctx(NonZeroU32::new(1024))
                .with_n_batch(1024)
                .with_n_ubatch(1024)
                .with_n_threads(2)
                .with_n_threads_batch(2)
                .with_type_k(KvCacheType::F32)
                .with_type_v(KvCacheType::F32)
                .with_flash_attention_policy(llama_cpp_sys_2::LLAMA_FLASH_ATTN_TYPE_DISABLED);
            let mut context = model.new_context(&backend, params)?;
            let mut batch = LlamaBatch::new(tokens.len(), 1);
            batch.add_sequence(&tokens, 0, true)?;
            context.decode(&mut batch)?;
            for i in 0..tokens.len() {
                for logit in context.get_logits_ith(i32::try_from(i)?) {
                    out.write_all(&logit.to_le_bytes())?;
                }
            }
        }
        all.push(tokens.iter().map(|token| token.0).collect::<Vec<_>>());
    }
    out.flush()?;
    println!("{}", serde_json::to_string(&all)?);
    Ok(())
}
