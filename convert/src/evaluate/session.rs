//! A model and its state in llama.cpp. llama-cpp-2 has no way to observe the graph, so this stands on the C interface.

use std::ffi::{CString, c_void};
use std::path::{Path, PathBuf};
use std::ptr::{self, NonNull};

use llama_cpp_sys_2 as sys;

use super::{EvaluateError, MIN_CTX, Operation, Options};
use crate::gguf::Gguf;
use crate::llama_cpp::{self, LlamaCppError};

/// Somebody who sees every operation of the graph.
pub trait Observer {
    /// Whether there is anything to see at all. Without it, llama.cpp computes the graph in one go.
    const OBSERVES: bool = true;
    /// Whether the operation's operands are of interest. It is asked before the operation is computed.
    fn wants(&mut self, operation: &Operation<'_>) -> bool;
    /// An operation of interest, computed. False stops the computation of this batch.
    fn see(&mut self, operation: &Operation<'_>) -> bool;
}

/// Nobody looks.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unobserved;

impl Observer for Unobserved {
    const OBSERVES: bool = false;

    fn wants(&mut self, _: &Operation<'_>) -> bool {
        false
    }

    fn see(&mut self, _: &Operation<'_>) -> bool {
        true
    }
}

/// A loaded model with a memory of one chunk.
#[derive(Debug)]
pub struct Session<O> {
    path: PathBuf,
    context: NonNull<sys::llama_context>,
    model: NonNull<sys::llama_model>,
    /// A box that llama.cpp has the address of.
    observer: NonNull<O>,
    batch: usize,
    vocabulary: usize,
    /// The number of tokens of the last batch whose logits were asked for.
    outputs: usize,
}

#[expect(unsafe_code, reason = "llama.cpp is C")]
// SAFETY: model and context belong to no thread, and only the session has their addresses; llama.cpp is called from
// within `&self` and `&mut self` only, and a session is not `Sync`. The observer goes along.
unsafe impl<O: Send> Send for Session<O> {}

impl<O: Observer> Session<O> {
    /// Checks the file, then loads the model.
    pub fn open(path: &Path, options: &Options, observer: O) -> Result<Self, EvaluateError> {
        if options.ctx < MIN_CTX {
            return Err(EvaluateError::Ctx { ctx: options.ctx });
        }
        check(path)?;
        let error = |source| EvaluateError::LlamaCpp {
            path: path.to_path_buf(),
            source,
        };
        let bad = |why: &str| error(LlamaCppError::Load(why.to_owned()));
        let name =
            CString::new(path.as_os_str().as_encoded_bytes()).map_err(|_| bad("its name has a zero"))?;
        let ctx = u32::try_from(options.ctx).map_err(|_| bad("the chunks are too long"))?;
        let model = llama_cpp::attempt(|| load(&name).ok_or("no model")).map_err(error)?;
        #[expect(unsafe_code, reason = "llama.cpp is C")]
        // SAFETY: the model is loaded; its vocabulary lives as long as it does.
        let (vocabulary, trained) = unsafe {
            let vocabulary = sys::llama_model_get_vocab(model.as_ptr());
            let size = sys::llama_vocab_n_tokens(vocabulary);
            (size, sys::llama_model_n_ctx_train(model.as_ptr()))
        };
        if usize::try_from(trained).is_ok_and(|trained| options.ctx > trained) {
            tracing::warn!(
                "{}: trained on {trained} tokens at a time, and measured here on {ctx}",
                path.display()
            );
        }
        let observer = Box::into_raw(Box::new(observer));
        let batch = options.batch();
        let threads = options.threads.map(std::num::NonZeroUsize::get);
        let threads = threads.unwrap_or_else(rayon::current_num_threads);
        let context = llama_cpp::attempt(|| start(model, ctx, batch, threads, observer).ok_or("no memory"));
        let context = context.map_err(|source| {
            #[expect(unsafe_code, reason = "llama.cpp is C")]
            // SAFETY: there is no context that would know the model or the observer.
            unsafe {
                sys::llama_model_free(model.as_ptr());
                drop(Box::from_raw(observer));
            }
            error(source)
        })?;
        Ok(Self {
            path: path.to_path_buf(),
            context,
            model,
            #[expect(unsafe_code, reason = "llama.cpp is C")]
            // SAFETY: the address of a box is never null.
            observer: unsafe { NonNull::new_unchecked(observer) },
            batch,
            vocabulary: usize::try_from(vocabulary).unwrap_or(0),
            outputs: 0,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The number of tokens of the vocabulary.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// The longest batch.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Who looks on.
    pub fn observer(&mut self) -> &mut O {
        #[expect(unsafe_code, reason = "llama.cpp is C")]
        // SAFETY: llama.cpp calls the observer only within `decode`, which borrows the session.
        unsafe {
            self.observer.as_mut()
        }
    }

    /// The tokens of a text, with those that the model wants around it. Special tokens in the text are text.
    pub fn tokenize(&self, text: &str) -> Result<Vec<i32>, EvaluateError> {
        let too_long = || self.compute("the text is too long".into());
        let length = i32::try_from(text.len()).map_err(|_| too_long())?;
        // A token per byte, and one before and behind them.
        let mut tokens = vec![0; text.len() + 2];
        #[expect(unsafe_code, reason = "llama.cpp is C")]
        // SAFETY: text and tokens are as long as llama.cpp is told.
        let tokenize = |tokens: &mut Vec<i32>| unsafe {
            let vocabulary = sys::llama_model_get_vocab(self.model.as_ptr());
            let room = i32::try_from(tokens.len()).unwrap_or(i32::MAX);
            let out = tokens.as_mut_ptr();
            sys::llama_tokenize(vocabulary, text.as_ptr().cast(), length, out, room, true, false)
        };
        let mut count = tokenize(&mut tokens);
        if count < 0 && count != i32::MIN {
            tokens.resize(count.unsigned_abs() as usize, 0);
            count = tokenize(&mut tokens);
        }
        tokens.truncate(usize::try_from(count).map_err(|_| too_long())?);
        Ok(tokens)
    }

    /// The token at the beginning of a text, if the model wants one there.
    pub fn start_token(&self) -> Option<i32> {
        #[expect(unsafe_code, reason = "llama.cpp is C")]
        // SAFETY: the vocabulary lives as long as the model.
        unsafe {
            let vocabulary = sys::llama_model_get_vocab(self.model.as_ptr());
            sys::llama_vocab_get_add_bos(vocabulary).then(|| sys::llama_vocab_bos(vocabulary))
        }
    }

    /// Forgets all tokens.
    pub fn clear(&mut self) {
        #[expect(unsafe_code, reason = "llama.cpp is C")]
        // SAFETY: the memory lives as long as the context.
        unsafe {
            sys::llama_memory_clear(sys::llama_get_memory(self.context.as_ptr()), true);
        }
    }

    /// Computes the tokens that follow those so far, at most [`Session::batch`] of them. The logits after those for
    /// which `wanted` holds are kept.
    pub fn decode(&mut self, tokens: &[i32], wanted: impl Fn(usize) -> bool) -> Result<(), EvaluateError> {
        if tokens.is_empty() || tokens.len() > self.batch {
            return Err(self.compute(format!("a batch of {} tokens", tokens.len())));
        }
        let mut tokens = tokens.to_vec();
        let mut wanted: Vec<i8> = (0..tokens.len()).map(|at| i8::from(wanted(at))).collect();
        self.outputs = wanted.iter().filter(|wanted| **wanted != 0).count();
        let batch = sys::llama_batch {
            n_tokens: i32::try_from(tokens.len()).unwrap_or(0),
            token: tokens.as_mut_ptr(),
            embd: ptr::null_mut(),
            pos: ptr::null_mut(),
            n_seq_id: ptr::null_mut(),
            seq_id: ptr::null_mut(),
            logits: wanted.as_mut_ptr(),
        };
        #[expect(unsafe_code, reason = "llama.cpp is C")]
        // SAFETY: the arrays of the batch live until the end of this function; null means one sequence that goes on.
        let code = unsafe {
            let code = sys::llama_decode(self.context.as_ptr(), batch);
            sys::llama_synchronize(self.context.as_ptr());
            code
        };
        match code {
            0 => Ok(()),
            code => Err(self.compute(format!("llama_decode gives {code}"))),
        }
    }

    /// The logits that the last batch was asked for, one row after the other.
    pub fn logits(&self) -> Result<&[f32], EvaluateError> {
        if self.outputs == 0 {
            return Ok(&[]);
        }
        #[expect(unsafe_code, reason = "llama.cpp is C")]
        // SAFETY: llama.cpp has as many rows as the last batch asked for, and they stay until the next one.
        unsafe {
            let logits = sys::llama_get_logits(self.context.as_ptr());
            if logits.is_null() {
                return Err(self.compute("it gives no logits: is this a language model?".into()));
            }
            Ok(std::slice::from_raw_parts(logits, self.outputs * self.vocabulary))
        }
    }

    fn compute(&self, why: String) -> EvaluateError {
        EvaluateError::Compute {
            path: self.path.clone(),
            why,
        }
    }
}

impl<O> Drop for Session<O> {
    fn drop(&mut self) {
        #[expect(unsafe_code, reason = "llama.cpp is C")]
        // SAFETY: the context goes first, which knows the others; none is used after this.
        unsafe {
            sys::llama_free(self.context.as_ptr());
            sys::llama_model_free(self.model.as_ptr());
            drop(Box::from_raw(self.observer.as_ptr()));
        }
    }
}

/// Looks at the file with our own reader, which believes nothing, before llama.cpp sees it.
fn check(path: &Path) -> Result<(), EvaluateError> {
    let gguf = Gguf::open(path)?;
    let no_model = |why: String| {
        Err(EvaluateError::NoModel {
            path: path.to_path_buf(),
            why,
        })
    };
    match gguf.get("general.type").map(|kind| kind.as_str()) {
        None | Some(Some("model")) => {}
        Some(kind) => {
            let kind = kind.unwrap_or("something unknown");
            return no_model(format!("general.type says that this is {kind}, not a model"));
        }
    }
    if gguf.tensors().is_empty() {
        return no_model("the file holds a vocabulary only".into());
    }
    match gguf.string("tokenizer.ggml.model")? {
        "none" | "no_vocab" => no_model("the model has no vocabulary to read a text with".into()),
        _ => gguf
            .strings("tokenizer.ggml.tokens")
            .map(|_| ())
            .map_err(Into::into),
    }
}

fn load(path: &CString) -> Option<NonNull<sys::llama_model>> {
    #[expect(unsafe_code, reason = "llama.cpp is C")]
    // SAFETY: the path ends in a zero and outlives the call.
    unsafe {
        let mut params = sys::llama_model_default_params();
        params.n_gpu_layers = 0;
        NonNull::new(sys::llama_model_load_from_file(path.as_ptr(), params))
    }
}

fn start<O: Observer>(
    model: NonNull<sys::llama_model>,
    ctx: u32,
    batch: usize,
    threads: usize,
    observer: *mut O,
) -> Option<NonNull<sys::llama_context>> {
    let threads = i32::try_from(threads).unwrap_or(i32::MAX);
    #[expect(unsafe_code, reason = "llama.cpp is C")]
    // SAFETY: model and observer outlive the context, as `Session` sees to.
    unsafe {
        let mut params = sys::llama_context_default_params();
        params.n_ctx = ctx;
        params.n_batch = u32::try_from(batch).unwrap_or(ctx);
        params.n_ubatch = params.n_batch;
        params.n_seq_max = 1;
        params.n_threads = threads;
        params.n_threads_batch = threads;
        if O::OBSERVES {
            params.cb_eval = Some(observe::<O>);
            params.cb_eval_user_data = observer.cast();
        }
        NonNull::new(sys::llama_init_from_model(model.as_ptr(), params))
    }
}

/// llama.cpp asks before each operation whether it is of interest, and shows it when it is computed.
extern "C" fn observe<O: Observer>(tensor: *mut sys::ggml_tensor, ask: bool, observer: *mut c_void) -> bool {
    #[expect(unsafe_code, reason = "llama.cpp is C")]
    // SAFETY: llama.cpp gives back the address that `start` gave it, and nobody else uses the observer meanwhile.
    let (tensor, observer) = unsafe { (tensor.as_ref(), observer.cast::<O>().as_mut()) };
    let (Some(tensor), Some(observer)) = (tensor, observer) else {
        return false;
    };
    let operation = Operation::new(tensor);
    if ask {
        observer.wants(&operation)
    } else {
        observer.see(&operation)
    }
}
