//! llama.cpp: one thread owns model, context and batch, and answers one job at a time.
//!
//! In: a [`Job`]. Out: text, piece by piece, and a [`Finished`]. Every size is checked before llama.cpp is called,
//! because it aborts the process on what it does not expect (a batch of more than `n_batch` tokens, for one). There is no way to
//! interrupt a call, so prefill goes in chunks and between two of them the caller is asked whether to go on.

use std::num::NonZeroU32;
use std::path::Path;
use std::time::Instant;

use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::token::LlamaToken;

use super::output::Output;
use super::prompt::Prompt;
use super::{Finished, Job, JobError, ModelInfo, Settings, sampler};
use crate::{cores, model};

/// Largest batch, in tokens.
const N_BATCH: u32 = 512;
/// Smallest context worth having.
const LEAST_CONTEXT: u32 = 256;

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
    /// No memory for the context, most often.
    #[error(
        "model {path}: no context of {n_ctx} tokens: {reason}; hint: a smaller --ctx, or [model] n_ctx, takes less memory"
    )]
    Context {
        /// The file.
        path: String,
        /// Tokens asked for.
        n_ctx: u32,
        /// llama.cpp's reason.
        reason: String,
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
    context: LlamaContext<'static>,
    batch: LlamaBatch<'static>,
    prompt: Prompt,
    info: ModelInfo,
    chunk: usize,
}

impl Llama {
    /// Loads the model and makes its context.
    ///
    /// # Errors
    /// [`LoadError`]
    pub fn load(settings: &Settings) -> Result<Self, LoadError> {
        let started = Instant::now();
        let header = model::inspect(&settings.model)?;
        let path = settings.model.display().to_string();
        let backend = LlamaBackend::init()?;
        let loaded = LlamaModel::load_from_file(&backend, &settings.model, &LlamaModelParams::default())
            .map_err(|_| LoadError::Refused { path: path.clone() })?;
        // One model in one process, for as long as it lives: a context then borrows for 'static.
        let model: &'static LlamaModel = Box::leak(Box::new(loaded));
        let trained = model.n_ctx_train();
        let n_ctx = settings
            .n_ctx
            .min(trained.max(1))
            .max(LEAST_CONTEXT.min(trained.max(1)));
        let threads = if settings.threads == 0 {
            cores::physical()
        } else {
            settings.threads
        };
        let params = LlamaContextParams::default()
            .with_n_ctx(NonZeroU32::new(n_ctx))
            .with_n_batch(N_BATCH)
            .with_n_ubatch(N_BATCH)
            .with_n_threads(threads as i32)
            .with_n_threads_batch(threads as i32);
        let context = model
            .new_context(&backend, params)
            .map_err(|error| LoadError::Context {
                path: path.clone(),
                n_ctx,
                reason: error.to_string(),
            })?;
        // Freed with the process.
        std::mem::forget(backend);
        let prompt = Prompt::of(model).map_err(|reason| LoadError::Template { path, reason })?;
        let chunk = settings.prefill_chunk.clamp(1, context.n_batch().min(N_BATCH)) as usize;
        let info = ModelInfo {
            name: header.name.unwrap_or_else(|| file_stem(&settings.model)),
            architecture: header.architecture,
            quantisation: header.quantisation,
            bytes: model.size(),
            parameters: model.n_params(),
            context: context.n_ctx(),
            context_trained: trained,
            chat_template: prompt.has_template(),
            threads,
            load_ms: started.elapsed().as_millis() as u64,
        };
        Ok(Self {
            model,
            context,
            batch: LlamaBatch::new(chunk.max(1), 1),
            prompt,
            info,
            chunk,
        })
    }

    /// What was loaded.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// Answers one job. `step` gets every new piece of text, and an empty one after every chunk of prefill; when
    /// it returns false, the job is cancelled.
    ///
    /// # Errors
    /// [`JobError`]
    pub fn answer(&mut self, job: &Job, step: &mut dyn FnMut(&str) -> bool) -> Result<Finished, JobError> {
        let started = Instant::now();
        let prompt = self.prompt.tokens(self.model, &job.messages)?;
        let context = self.context.n_ctx();
        if prompt.is_empty() {
            return Err(JobError::Template("it rendered nothing".to_owned()));
        }
        // The answer needs room for one token at least.
        if prompt.len() + 1 > context as usize {
            return Err(JobError::TooLarge {
                tokens: prompt.len(),
                context,
            });
        }
        self.prefill(&prompt, step)?;
        let prefilled = Instant::now();
        let finished = self.decode(job, prompt.len() as i32, step)?;
        Ok(Finished {
            prompt_tokens: prompt.len() as u32,
            prompt_ms: (prefilled - started).as_secs_f64() * 1000.0,
            predicted_ms: prefilled.elapsed().as_secs_f64() * 1000.0,
            ..finished
        })
    }

    fn prefill(&mut self, prompt: &[LlamaToken], step: &mut dyn FnMut(&str) -> bool) -> Result<(), JobError> {
        // Removing a whole sequence cannot fail.
        self.context
            .clear_kv_cache_seq(None, None, None)
            .map_err(|error| JobError::Llama(format!("the KV cache cannot be cleared: {error}")))?;
        let last = prompt.len() - 1;
        for (chunk, tokens) in prompt.chunks(self.chunk).enumerate() {
            self.batch.clear();
            for (at, &token) in tokens.iter().enumerate() {
                let position = chunk * self.chunk + at;
                self.add(token, position as i32, position == last)?;
            }
            self.run()?;
            if !step("") {
                return Err(JobError::Cancelled);
            }
        }
        Ok(())
    }

    fn decode(
        &mut self,
        job: &Job,
        prompt_tokens: i32,
        step: &mut dyn FnMut(&str) -> bool,
    ) -> Result<Finished, JobError> {
        let vocab = self.model.vocab();
        let mut sampler = sampler::build(&job.sampling);
        let mut output = Output::new(&job.stop);
        let mut text = String::new();
        let mut completion_tokens = 0_u32;
        let room = self.context.n_ctx() as i32 - prompt_tokens;
        let most = job.max_tokens.min(room.max(0) as u32);
        let mut finish_reason = "length";
        while completion_tokens < most {
            let token = sampler.sample(&self.context, self.batch.n_tokens() - 1);
            if vocab.is_eog(token) {
                finish_reason = "stop";
                break;
            }
            completion_tokens += 1;
            let piece = output.push(&vocab.token_to_piece(token, false, None));
            text.push_str(&piece);
            if !step(&piece) {
                return Err(JobError::Cancelled);
            }
            if output.stopped() {
                finish_reason = "stop";
                break;
            }
            if completion_tokens < most {
                self.batch.clear();
                self.add(token, prompt_tokens + completion_tokens as i32 - 1, true)?;
                self.run()?;
            }
        }
        let rest = output.finish();
        if !rest.is_empty() {
            text.push_str(&rest);
            step(&rest);
        }
        Ok(Finished {
            text,
            finish_reason: finish_reason.to_owned(),
            completion_tokens,
            ..Finished::default()
        })
    }

    fn add(&mut self, token: LlamaToken, position: i32, logits: bool) -> Result<(), JobError> {
        self.batch
            .add(token, position, &[0], logits)
            .map_err(|error| JobError::Llama(format!("the batch is full: {error}")))
    }

    fn run(&mut self) -> Result<(), JobError> {
        self.context
            .decode(&mut self.batch)
            .map_err(|error| JobError::Llama(format!("llama.cpp cannot decode: {error}")))
    }
}

fn file_stem(path: &Path) -> String {
    path.file_stem()
        .map_or_else(String::new, |stem| stem.to_string_lossy().into_owned())
}
