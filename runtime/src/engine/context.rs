//! A context of llama.cpp: the KV of all sequences, the threads that compute, and the logits of the last batch.
//!
//! In: a [`Batch`] of tokens with positions and sequences. Out: rows of logits, and sequences that can be copied, dropped
//! and carried to memory and back as a [`State`]. It stands in place of llama-cpp-2's context, which hides its pointer:
//! without it no threads can be attached, and ggml then starts and joins its threads for every single token
//! (docs/decisions/0016).
//!
//! Source: llama.h and ggml-cpu.h of the llama.cpp in llama-cpp-sys-2.

#![expect(
    unsafe_code,
    reason = "llama.cpp's C interface, and nothing else, is called here"
)]

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use llama_cpp_2::model::{LlamaLoraAdapter, LlamaModel};
use llama_cpp_2::token::LlamaToken;
use llama_cpp_sys_2 as sys;

/// How long ggml's threads look for the next graph before they sleep, in ggml's own unit (0 never looks, 100 is about a
/// tenth of a second). Long enough for the time between two tokens; an idle device sleeps.
const POLL: u32 = 50;

/// What a context is made with.
#[derive(Clone, Debug)]
pub struct Params {
    /// Cells, shared by all sequences.
    pub n_ctx: u32,
    /// Most tokens of a batch.
    pub n_batch: u32,
    /// Sequences; also the most rows of logits of a batch.
    pub n_seq_max: u32,
    /// Threads that compute.
    pub threads: u32,
    /// Type of the keys.
    pub type_k: sys::ggml_type,
    /// Type of the values.
    pub type_v: sys::ggml_type,
}

/// Why a batch was not computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// There are not enough cells; everything is as it was.
    #[error("no room in the context")]
    NoRoom,
    /// It was interrupted; everything is as it was.
    #[error("interrupted")]
    Interrupted,
    /// Something else.
    #[error("llama_decode returned {0}")]
    Failed(i32),
}

/// Tokens to compute together.
#[derive(Debug, Default)]
pub struct Batch {
    tokens: Vec<sys::llama_token>,
    positions: Vec<sys::llama_pos>,
    sequences: Vec<sys::llama_seq_id>,
    logits: Vec<i8>,
    rows: usize,
}

impl Batch {
    /// Takes everything out.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.sequences.clear();
        self.logits.clear();
        self.rows = 0;
    }

    /// Adds a token; `logits` are wanted of it or not.
    pub fn add(&mut self, token: LlamaToken, position: i32, sequence: i32, logits: bool) {
        self.tokens.push(token.0);
        self.positions.push(position);
        self.sequences.push(sequence);
        self.logits.push(i8::from(logits));
        self.rows += usize::from(logits);
    }

    /// Tokens in it.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }
}

/// A sequence outside of the context: llama.cpp's own bytes.
#[derive(Clone, Debug)]
pub struct State(Vec<u8>);

impl State {
    /// Bytes that [`Context::state`] of the same build made of the same model with the same types of cache: llama.cpp
    /// ends the process on some others.
    pub fn trusted(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// ggml's threads.
#[derive(Debug)]
struct Threads(NonNull<sys::ggml_threadpool>);

impl Threads {
    /// `None` for one thread, which needs no others.
    fn new(count: u32, poll: u32) -> Option<Self> {
        let count = i32::try_from(count).ok().filter(|&count| count > 1)?;
        // SAFETY: a plain function that fills a structure.
        let mut params = unsafe { sys::ggml_threadpool_params_default(count) };
        params.poll = poll;
        // SAFETY: the parameters are read during the call only.
        NonNull::new(unsafe { sys::ggml_threadpool_new(&raw mut params) }).map(Self)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        // SAFETY: the pointer came from ggml_threadpool_new, and the context that used it is gone (fields of `Context`).
        unsafe { sys::ggml_threadpool_free(self.0.as_ptr()) }
    }
}

/// The context.
#[derive(Debug)]
pub struct Context {
    context: NonNull<sys::llama_context>,
    /// By their number, each made when it is asked for. Freed after the context, which may still know of any.
    pools: BTreeMap<u32, Option<Threads>>,
    /// Looked at between two operations of a graph.
    _interrupt: Arc<AtomicBool>,
    vocabulary: usize,
    /// Which tokens of the last batch have logits.
    rows: Vec<i8>,
    sequences: usize,
    /// What llama.cpp wants as one pointer for each token.
    pointers: Vec<*mut sys::llama_seq_id>,
    counts: Vec<i32>,
}

impl Context {
    /// A context of `model`; `None` when llama.cpp refuses, for want of memory most often. When `interrupt` is true, the
    /// batch that is being computed ends, and every other until it is false again.
    pub fn new(model: &'static LlamaModel, params: &Params, interrupt: &Arc<AtomicBool>) -> Option<Self> {
        // SAFETY: a plain function that fills a structure.
        let mut with = unsafe { sys::llama_context_default_params() };
        with.n_ctx = params.n_ctx;
        with.n_batch = params.n_batch;
        with.n_ubatch = params.n_batch;
        with.n_seq_max = params.n_seq_max;
        // Else buffers for the logits of a whole batch are laid out.
        with.n_outputs_max = params.n_seq_max;
        with.n_threads = i32::try_from(params.threads).unwrap_or(i32::MAX);
        with.n_threads_batch = with.n_threads;
        with.kv_unified = true;
        with.swa_full = false;
        with.no_perf = true;
        with.type_k = params.type_k;
        with.type_v = params.type_v;
        // SAFETY: the model lives for ever, and llama.cpp changes it here only, before any other thread knows of it.
        let context = NonNull::new(unsafe { sys::llama_init_from_model(pointer(model), with) })?;
        let interrupt = Arc::clone(interrupt);
        // SAFETY: the flag lives as long as the context, which keeps an owner of it.
        unsafe {
            let flag = Arc::as_ptr(&interrupt).cast_mut().cast::<c_void>();
            sys::llama_set_abort_callback(context.as_ptr(), Some(interrupted), flag);
        }
        let mut made = Self {
            context,
            pools: BTreeMap::new(),
            _interrupt: interrupt,
            vocabulary: usize::try_from(model.n_vocab()).unwrap_or(0),
            rows: Vec::new(),
            sequences: params.n_seq_max as usize,
            pointers: Vec::new(),
            counts: Vec::new(),
        };
        made.use_threads(params.threads);
        Some(made)
    }

    /// From here on `count` threads compute.
    pub fn use_threads(&mut self, count: u32) {
        let usual = self.pools.keys().next_back().is_none_or(|&usual| usual == count);
        // Threads of a pool that have nothing to do look for work all the same, and heat the machine. Where fewer are to compute
        // they are a pool of their own, whose threads sleep between two graphs; ggml stops the other as soon as this one computes.
        let poll = if usual { POLL } else { 0 };
        let threads = self
            .pools
            .entry(count)
            .or_insert_with(|| Threads::new(count, poll));
        let pool = threads
            .as_ref()
            .map_or(std::ptr::null_mut(), |threads| threads.0.as_ptr());
        let count = i32::try_from(count).unwrap_or(i32::MAX).max(1);
        // SAFETY: context and pool are there, the pool until the context is gone, and nothing is computed meanwhile: this borrows
        // the context alone. Null is no pool: ggml then starts the threads that it needs, for one none.
        unsafe {
            sys::llama_attach_threadpool(self.context.as_ptr(), pool, pool);
            sys::llama_set_n_threads(self.context.as_ptr(), count, count);
        }
    }

    /// Cells.
    pub fn cells(&self) -> u32 {
        // SAFETY: the context is there.
        unsafe { sys::llama_n_ctx(self.context.as_ptr()) }
    }

    /// Computes a batch of at most `n_batch` tokens.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(&mut self, batch: &mut Batch) -> Result<(), DecodeError> {
        self.rows.clear();
        // llama.cpp asserts both.
        if batch.is_empty() || batch.rows > self.sequences {
            return Err(DecodeError::Failed(-1));
        }
        let count = i32::try_from(batch.len()).map_err(|_| DecodeError::Failed(-1))?;
        self.counts.resize(batch.len(), 1);
        self.pointers.clear();
        self.pointers
            .extend(batch.sequences.iter_mut().map(|sequence| &raw mut *sequence));
        let raw = sys::llama_batch {
            n_tokens: count,
            token: batch.tokens.as_mut_ptr(),
            embd: std::ptr::null_mut(),
            pos: batch.positions.as_mut_ptr(),
            n_seq_id: self.counts.as_mut_ptr(),
            seq_id: self.pointers.as_mut_ptr(),
            logits: batch.logits.as_mut_ptr(),
        };
        // SAFETY: every array has `count` elements and outlives the call, after which llama.cpp keeps none of them.
        let code = unsafe { sys::llama_decode(self.context.as_ptr(), raw) };
        match code {
            0 => {
                self.rows.clone_from(&batch.logits);
                Ok(())
            }
            1 => Err(DecodeError::NoRoom),
            2 => Err(DecodeError::Interrupted),
            code => Err(DecodeError::Failed(code)),
        }
    }

    /// The logits after token `index` of the last batch; `None` when they were not asked for.
    pub fn logits(&self, index: usize) -> Option<&[f32]> {
        if self.rows.get(index) != Some(&1) {
            return None;
        }
        let index = i32::try_from(index).ok()?;
        // SAFETY: llama.cpp returns a row of the vocabulary's size, or null. It is written again by `decode` only, which
        // borrows the context mutably.
        unsafe {
            let row = sys::llama_get_logits_ith(self.context.as_ptr(), index);
            (!row.is_null()).then(|| std::slice::from_raw_parts(row, self.vocabulary))
        }
    }

    /// From here on the model computes with this adapter, or with none.
    ///
    /// # Errors
    /// llama.cpp's code.
    pub fn adapt(&mut self, adapter: Option<&LlamaLoraAdapter>) -> Result<(), i32> {
        let mut adapters: Vec<*mut sys::llama_adapter_lora> = adapter.map(of_adapter).into_iter().collect();
        let mut scales = vec![1.0_f32; adapters.len()];
        // SAFETY: both arrays have that many elements; an adapter lives as long as its model.
        let code = unsafe {
            sys::llama_set_adapters_lora(
                self.context.as_ptr(),
                adapters.as_mut_ptr(),
                adapters.len(),
                scales.as_mut_ptr(),
            )
        };
        if code == 0 { Ok(()) } else { Err(code) }
    }

    /// Lets `to` have what `from` has at the positions `first..end`, in the same cells.
    pub fn copy(&mut self, from: i32, to: i32, first: usize, end: usize) {
        let (Ok(first), Ok(end)) = (i32::try_from(first), i32::try_from(end)) else {
            return;
        };
        if self.knows(from) && self.knows(to) {
            // SAFETY: both sequences are ones that the context has.
            unsafe { sys::llama_memory_seq_cp(self.memory(), from, to, first, end) }
        }
    }

    /// Takes everything out of a sequence.
    pub fn forget(&mut self, sequence: i32) {
        if self.knows(sequence) {
            // SAFETY: the context has this sequence; a whole one can always be removed.
            unsafe { sys::llama_memory_seq_rm(self.memory(), sequence, -1, -1) };
        }
    }

    /// The first position that a sequence still has; -1 when it has none.
    pub fn first_position(&self, sequence: i32) -> i32 {
        if !self.knows(sequence) {
            return -1;
        }
        // SAFETY: the context has this sequence.
        unsafe { sys::llama_memory_seq_pos_min(self.memory(), sequence) }
    }

    /// A copy of a sequence; `None` when it is larger than `most` bytes, or llama.cpp does not give it.
    pub fn state(&self, sequence: i32, most: u64) -> Option<State> {
        if !self.knows(sequence) {
            return None;
        }
        let context = self.context.as_ptr();
        // SAFETY: the context has this sequence.
        let size = unsafe { sys::llama_state_seq_get_size_ext(context, sequence, 0) };
        if size as u64 > most {
            return None;
        }
        let mut bytes = Vec::<u8>::new();
        bytes.try_reserve_exact(size).ok()?;
        // SAFETY: there is room for `size` bytes; llama.cpp writes at most as many and says how many it wrote.
        unsafe {
            let written = sys::llama_state_seq_get_data_ext(context, bytes.as_mut_ptr(), size, sequence, 0);
            if written == 0 || written > size {
                return None;
            }
            bytes.set_len(written);
        }
        Some(State(bytes))
    }

    /// Puts a state into an empty sequence; false when llama.cpp does not take it (no room), and then it is empty.
    pub fn restore(&mut self, sequence: i32, state: &State) -> bool {
        if !self.knows(sequence) {
            return false;
        }
        let bytes = state.bytes();
        // SAFETY: the context has this sequence; the bytes are what `state` promises.
        let read = unsafe {
            sys::llama_state_seq_set_data_ext(self.context.as_ptr(), bytes.as_ptr(), bytes.len(), sequence, 0)
        };
        if read == 0 {
            self.forget(sequence);
        }
        read > 0
    }

    /// llama.cpp asserts it.
    fn knows(&self, sequence: i32) -> bool {
        usize::try_from(sequence).is_ok_and(|sequence| sequence < self.sequences)
    }

    fn memory(&self) -> sys::llama_memory_t {
        // SAFETY: the context is there.
        unsafe { sys::llama_get_memory(self.context.as_ptr()) }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the pointer came from llama_init_from_model; nothing else has it.
        unsafe { sys::llama_free(self.context.as_ptr()) }
    }
}

/// ggml asks between two operations whether to go on.
unsafe extern "C" fn interrupted(flag: *mut c_void) -> bool {
    // SAFETY: it is the flag that `Context::new` has set, which the context keeps.
    unsafe { (*flag.cast::<AtomicBool>()).load(Ordering::Relaxed) }
}

fn pointer(model: &LlamaModel) -> *mut sys::llama_model {
    const { assert!(size_of::<LlamaModel>() == size_of::<*mut sys::llama_model>()) }
    // SAFETY: `LlamaModel` is `repr(transparent)` over a pointer to llama_model (llama-cpp-2 is pinned to one version).
    unsafe { *std::ptr::from_ref(model).cast::<*mut sys::llama_model>() }
}

fn of_adapter(adapter: &LlamaLoraAdapter) -> *mut sys::llama_adapter_lora {
    const { assert!(size_of::<LlamaLoraAdapter>() == size_of::<*mut sys::llama_adapter_lora>()) }
    // SAFETY: as with the model.
    unsafe { *std::ptr::from_ref(adapter).cast::<*mut sys::llama_adapter_lora>() }
}
