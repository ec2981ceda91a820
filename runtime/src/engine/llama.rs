//! llama.cpp: one thread owns model, context, adapters and batch.
//!
//! In: tokens with positions and sequences. Out: logits, and sequences that can be copied and dropped. Every size is
//! checked before llama.cpp is called, because it aborts the process on what it does not expect (a batch of more than
//! `n_batch` tokens, for one).

use std::ops::Range;
use std::path::Path;
use std::time::Instant;

use llama_cpp_2::context::params::KvCacheType;
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::model::{LlamaLoraAdapter, LlamaModel};
use llama_cpp_2::token::LlamaToken;
use llama_cpp_sys_2::ggml_type;

use super::context::{Batch, Context, DecodeError, Params, State};
use super::interrupt::Interrupt;
use super::prompt::Prompt;
use super::{ModelInfo, Settings};
use crate::{cores, model};

/// Largest batch, in tokens.
pub const N_BATCH: u32 = 512;
/// Most sequences that llama.cpp takes (LLAMA_MAX_SEQ).
const MOST_SEQUENCES: u32 = 256;

/// Why a model cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file is not what it should be.
    #[error(transparent)]
    Model(#[from] model::ModelError),
    /// llama.cpp does not start.
    #[error("llama.cpp: {0}")]
    Backend(#[from] llama_cpp_2::LlamaCppError),
    /// llama.cpp refuses the file.
    #[error("model {path}: llama.cpp cannot load it; hint: `pipit serve -v` shows its own messages")]
    Refused {
        /// The file.
        path: String,
    },
    /// A type of the KV cache that is not known.
    #[error(
        "model.cache_type_{which}: `{name}` is no type of a KV cache; hint: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 or iq4_nl"
    )]
    CacheType {
        /// `k` or `v`
        which: char,
        /// What was asked for.
        name: String,
    },
    /// No memory for the context, most often.
    #[error(
        "model {path}: no context of {n_ctx} tokens; hint: a smaller --ctx, or [model] n_ctx, takes less memory; `pipit serve -v` shows llama.cpp's own messages"
    )]
    Context {
        /// The file.
        path: String,
        /// Tokens asked for.
        n_ctx: u32,
    },
    /// The template is broken.
    #[error("model {path}: its chat template is not Jinja: {reason}")]
    Template {
        /// The file.
        path: String,
        /// Where.
        reason: String,
    },
}

/// A loaded model.
#[derive(Debug)]
pub struct Llama {
    model: &'static LlamaModel,
    context: Context,
    batch: Batch,
    prompt: Prompt,
    info: ModelInfo,
    adapters: Vec<(String, LlamaLoraAdapter)>,
    active: Option<usize>,
    exact: bool,
    scratch: i32,
}

impl Llama {
    /// Loads the model and its adapters, and makes a context, whose steps `interrupt` can end.
    ///
    /// # Errors
    /// [`LoadError`]. An adapter that cannot be loaded is no error: it is missing in [`ModelInfo::adapters`].
    pub fn load(settings: &Settings, interrupt: &Interrupt) -> Result<Self, LoadError> {
        let started = Instant::now();
        let header = model::inspect(&settings.model)?;
        let path = settings.model.display().to_string();
        let type_k = cache_type('k', &settings.cache_type_k)?;
        let type_v = cache_type('v', &settings.cache_type_v)?;
        let backend = LlamaBackend::init()?;
        let loaded = LlamaModel::load_from_file(&backend, &settings.model, &LlamaModelParams::default())
            .map_err(|_| LoadError::Refused { path: path.clone() })?;
        // One model in one process, for as long as it lives: a context then borrows for 'static.
        let model = Box::leak(Box::new(loaded));
        let mut adapters = Vec::new();
        for (name, file) in &settings.adapters {
            // llama.cpp asserts that the file is there.
            match file.is_file().then(|| model.lora_adapter_init(file)) {
                Some(Ok(adapter)) => adapters.push((name.clone(), adapter)),
                Some(Err(error)) => {
                    tracing::error!(
                        "adapter {name} ({}) does not fit this model: {error}",
                        file.display()
                    );
                }
                None => tracing::error!("adapter {name}: {} is no file", file.display()),
            }
        }
        let model: &'static LlamaModel = model;
        let trained = model.n_ctx_train();
        let threads = if settings.threads == 0 {
            cores::threads()
        } else {
            settings.threads
        };
        cores::keep_to_the_fast(threads);
        let params = Params {
            n_ctx: settings.n_ctx,
            n_batch: N_BATCH,
            n_seq_max: sequences(settings.slots),
            threads,
            type_k,
            type_v,
        };
        let context = Context::new(model, &params, interrupt.flag()).ok_or_else(|| LoadError::Context {
            path: path.clone(),
            n_ctx: settings.n_ctx,
        })?;
        // Freed with the process.
        std::mem::forget(backend);
        let window = format!("{}.attention.sliding_window", header.architecture);
        let exact = model.is_recurrent() || model.is_hybrid() || model.meta_val_str(&window).is_ok();
        let prompt = Prompt::of(model).map_err(|reason| LoadError::Template { path, reason })?;
        let info = ModelInfo {
            name: header.name.unwrap_or_else(|| file_stem(&settings.model)),
            architecture: header.architecture,
            quantisation: header.quantisation,
            bytes: model.size(),
            parameters: model.n_params(),
            context: context.cells(),
            context_trained: trained,
            chat_template: prompt.has_template(),
            slots: settings.slots,
            adapters: adapters.iter().map(|(name, _)| name.clone()).collect(),
            threads,
            load_ms: started.elapsed().as_millis() as u64,
        };
        Ok(Self {
            model,
            context,
            batch: Batch::default(),
            prompt,
            info,
            adapters,
            active: None,
            exact,
            scratch: params.n_seq_max.cast_signed() - 1,
        })
    }

    /// From here on this share of the threads computes, at least one.
    pub fn use_threads(&mut self, share: f64) {
        let threads = (f64::from(self.info.threads) * share).round().max(1.0) as u32;
        self.context.use_threads(threads);
    }

    /// What was loaded.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// The model, for its vocabulary.
    pub fn model(&self) -> &'static LlamaModel {
        self.model
    }

    /// The logits after the token that [`Self::add`] gave this index; `None` when they were not asked for.
    pub fn logits(&self, index: usize) -> Option<&[f32]> {
        self.context.logits(index)
    }

    /// Turns conversations into tokens.
    pub fn prompt(&self) -> &Prompt {
        &self.prompt
    }

    /// Most tokens of one sequence.
    pub fn longest(&self) -> u32 {
        self.info.context.min(self.info.context_trained.max(1))
    }

    /// From here on the model computes with this adapter, or with none.
    ///
    /// # Errors
    /// llama.cpp's reason. An adapter that was not loaded counts as none: whoever accepts requests checks that.
    pub fn adapt(&mut self, name: Option<&str>) -> Result<(), String> {
        let wanted = name.and_then(|name| self.adapters.iter().position(|(known, _)| known == name));
        if wanted == self.active {
            return Ok(());
        }
        self.context
            .adapt(wanted.map(|at| &self.adapters[at].1))
            .map_err(|code| format!("llama.cpp does not take the adapter: {code}"))?;
        self.active = wanted;
        Ok(())
    }

    /// Begins a new batch.
    pub fn clear(&mut self) {
        self.batch.clear();
    }

    /// Adds a token to the batch; returns its index there. `None` when the batch is full.
    pub fn add(&mut self, token: LlamaToken, position: usize, sequence: i32, logits: bool) -> Option<usize> {
        let index = self.batch.len();
        let position = i32::try_from(position).ok()?;
        if index >= N_BATCH as usize {
            return None;
        }
        self.batch.add(token, position, sequence, logits);
        Some(index)
    }

    /// Tokens in the batch.
    pub fn batched(&self) -> usize {
        self.batch.len()
    }

    /// Computes the batch.
    ///
    /// # Errors
    /// llama.cpp's; `NoRoom` leaves everything as it was.
    pub fn decode(&mut self) -> Result<(), DecodeError> {
        self.context.decode(&mut self.batch)
    }

    /// Whether the model looks back only so far (sliding windows), or keeps a state instead of cells: then only whole
    /// sequences can be shared, once they are long.
    pub fn is_exact(&self) -> bool {
        self.exact
    }

    /// Whether a sequence of `whole` tokens holds what another needs that shares its first `count`.
    pub fn reaches_back(&self, sequence: i32, whole: usize, count: usize) -> bool {
        count == whole || self.context.first_position(sequence) == 0
    }

    /// Lets the empty sequence `to` begin with the first `count` tokens of `from`, in the same cells.
    pub fn copy(&mut self, from: i32, to: i32, count: usize) {
        self.context.copy(from, to, 0, count);
    }

    /// Forgets a sequence.
    pub fn forget(&mut self, sequence: i32) {
        self.context.forget(sequence);
    }

    /// A copy of the tokens `range` of a sequence that has `whole`; `None` when it is larger than `most` bytes, or
    /// llama.cpp does not give it.
    pub fn state(&mut self, sequence: i32, whole: usize, range: Range<usize>, most: u64) -> Option<State> {
        if range == (0..whole) {
            return self.context.state(sequence, most);
        }
        self.context.copy(sequence, self.scratch, range.start, range.end);
        let state = self.context.state(self.scratch, most);
        self.context.forget(self.scratch);
        state
    }

    /// Gives a sequence the tokens `wanted` from a copy of the tokens `held`. False when there is no room: then it has what
    /// it had.
    pub fn restore(
        &mut self,
        sequence: i32,
        state: &State,
        held: &Range<usize>,
        wanted: &Range<usize>,
    ) -> bool {
        if wanted == held && self.context.first_position(sequence) < 0 {
            return self.context.restore(sequence, state);
        }
        let restored = self.context.restore(self.scratch, state);
        if restored {
            self.context
                .copy(self.scratch, sequence, wanted.start, wanted.end);
            self.context.forget(self.scratch);
        }
        restored
    }
}

/// Sequences of a context: one for each slot, one for a request that takes over from one that is done, and one for what
/// goes to memory or comes from it.
pub fn sequences(slots: u32) -> u32 {
    slots.saturating_add(2).min(MOST_SEQUENCES)
}

fn cache_type(which: char, name: &str) -> Result<ggml_type, LoadError> {
    let kind = match name {
        "f32" => KvCacheType::F32,
        "f16" => KvCacheType::F16,
        "bf16" => KvCacheType::BF16,
        "q8_0" => KvCacheType::Q8_0,
        "q5_1" => KvCacheType::Q5_1,
        "q5_0" => KvCacheType::Q5_0,
        "q4_1" => KvCacheType::Q4_1,
        "q4_0" => KvCacheType::Q4_0,
        "iq4_nl" => KvCacheType::IQ4_NL,
        _ => {
            return Err(LoadError::CacheType {
                which,
                name: name.to_owned(),
            });
        }
    };
    Ok(kind.into())
}

fn file_stem(path: &Path) -> String {
    path.file_stem()
        .map_or_else(String::new, |stem| stem.to_string_lossy().into_owned())
}
