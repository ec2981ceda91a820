//! The qwen2 architecture (Qwen 2 and 2.5, and what was distilled into them): llama's block
//! ([`LlamaBlock`](super::llama::LlamaBlock)) with biases on queries, keys and values, and with a sliding window in
//! the upper blocks where `use_sliding_window` asks for it.
//!
//! Source: transformers models/qwen2/modeling_qwen2.py.

use serde_json::Value;

use super::config::{Defaults, Reader, Rope, windows};
use super::{Architecture, Config, ModelError};

pub(super) fn config(reader: &Reader<'_>) -> Result<Config, ModelError> {
    reader.one_of("hidden_act", &["silu"])?;
    reader.refuse_flags(
        &["use_mrope"],
        "positions in several dimensions are not supported",
    )?;
    let defaults = Defaults {
        head_dim: None,
        max_position_embeddings: 32_768,
        tie_word_embeddings: false,
    };
    let rope = Rope::read(reader, 10_000.0)?;
    Ok(Config {
        windows: qwen_windows(reader)?,
        ..Config::common(reader, Architecture::Qwen2, defaults, rope)?
    })
}

/// The windows of a Qwen: none unless `use_sliding_window`, whatever `sliding_window` says; then those of the blocks
/// from `max_window_layers` on, or of those that `layer_types` names.
pub(super) fn qwen_windows(reader: &Reader<'_>) -> Result<Vec<Option<usize>>, ModelError> {
    // A size of null switches the windows off, a size that is left out is 4096.
    let null = reader.json.get("sliding_window").is_some_and(Value::is_null);
    let size = match reader.flag("use_sliding_window", false)? && !null {
        true => Some(reader.size_or("sliding_window", 4096)?),
        false => None,
    };
    let first = reader.count_or("max_window_layers", 28)?;
    windows(reader, size, |block| size.is_some() && block >= first)
}
