//! llama.cpp in the process of a test: logits of a GGUF file, in f32 and on one thread.

use std::num::NonZeroU32;
use std::path::Path;

use llama_cpp_2::context::params::{KvCacheType, LlamaContextParams};
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::token::LlamaToken;

/// The backend, which can be initialised once in a process: the library has it.
pub(crate) fn backend() -> &'static LlamaBackend {
    pipit_convert::llama_cpp::backend().unwrap()
}

/// The logits after every token of `prompt`, one row after the other. The cache is f32 and flash attention is off,
/// so that nothing is rounded that need not be.
pub(crate) fn logits(model: &Path, prompt: &[i32]) -> Vec<f32> {
    logits_with(model, None, prompt)
}

/// The same with a GGUF adapter and its scale.
pub(crate) fn logits_with(model: &Path, adapter: Option<(&Path, f32)>, prompt: &[i32]) -> Vec<f32> {
    let mut model = LlamaModel::load_from_file(backend(), model, &LlamaModelParams::default()).unwrap();
    let adapter = adapter.map(|(path, scale)| (model.lora_adapter_init(path).unwrap(), scale));
    let params = LlamaContextParams::default()
        .with_n_ctx(NonZeroU32::new(256))
        .with_n_batch(256)
        .with_n_ubatch(256)
        .with_n_threads(1)
        .with_n_threads_batch(1)
        .with_type_k(KvCacheType::F32)
        .with_type_v(KvCacheType::F32)
        .with_flash_attention_policy(llama_cpp_sys_2::LLAMA_FLASH_ATTN_TYPE_DISABLED);
    let mut context = model.new_context(backend(), params).unwrap();
    if let Some((mut adapter, scale)) = adapter {
        context.lora_adapter_set(&mut adapter, scale).unwrap();
    }
    let mut batch = LlamaBatch::new(prompt.len(), 1);
    let prompt: Vec<_> = prompt.iter().map(|id| LlamaToken(*id)).collect();
    batch.add_sequence(&prompt, 0, true).unwrap();
    context.decode(&mut batch).unwrap();
    (0..prompt.len())
        .flat_map(|at| context.get_logits_ith(at as i32).to_vec())
        .collect()
}
