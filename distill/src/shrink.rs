//! A smaller model out of a larger one, as the start of a student: some of its blocks, attention heads and feed-forward
//! channels, whose weights stay as they are.

mod cut;
mod measure;

use std::io;
use std::path::PathBuf;

pub use cut::write;
pub use measure::{Measured, measure};
use pipit_convert::checkpoint::CheckpointError;

use crate::model::{Config, ModelError};

/// The sizes of the smaller model; what is not given stays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Channels of the feed-forward layers.
    pub intermediate_size: Option<usize>,
    /// Query heads.
    pub num_attention_heads: Option<usize>,
    /// Key and value heads. Without [`Sizes::num_attention_heads`], each keeps as many query heads as it had.
    pub num_key_value_heads: Option<usize>,
}

impl Sizes {
    /// Whether anything but blocks goes.
    pub fn any(&self) -> bool {
        *self != Self::default()
    }
}

/// What stays of one block: indices in the larger model, ascending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptBlock {
    /// The block.
    pub layer: usize,
    /// Its query heads, those of each key and value head together.
    pub heads: Vec<usize>,
    /// Its key and value heads.
    pub kv_heads: Vec<usize>,
    /// The channels of its feed-forward layer.
    pub channels: Vec<usize>,
}

/// Why a model cannot be made smaller.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShrinkError {
    /// The model cannot be read.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The blocks to keep cannot be kept.
    #[error("the blocks to keep: {why}\nhint: the model has {layers}, from 0 to {}, and their order stays", .layers - 1)]
    Layers {
        /// What is wrong.
        why: String,
        /// The number of the model's blocks.
        layers: usize,
    },
    /// A size is none that the model can get.
    #[error("{key} {size}: {why}")]
    Size {
        /// The key in `config.json`.
        key: &'static str,
        /// The size that was asked for.
        size: usize,
        /// What is wrong with it.
        why: String,
    },
    /// Heads or channels are to go, and nothing was measured.
    #[error("which heads and channels go is measured on a text, and there is none\nhint: --data names one")]
    Unmeasured,
    /// The text has no token, or the model gives no number for it.
    #[error("the model gives no finite number on this text, so nothing can be said of its blocks")]
    NotFinite,
    /// A file cannot be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The `count` blocks with the largest influence, in the model's order; of equals the first.
///
/// ShortGPT removes those with the least, <https://arxiv.org/abs/2403.03853> section 3.2.
pub fn most_influential(influence: &[f64], count: usize) -> Result<Vec<usize>, ShrinkError> {
    let layers = influence.len();
    if influence.iter().any(|x| !x.is_finite()) {
        return Err(ShrinkError::NotFinite);
    }
    if count == 0 || count > layers {
        let why = format!("{count} of them");
        return Err(ShrinkError::Layers { why, layers });
    }
    Ok(largest(influence, count))
}

/// Checks a list of blocks: at least one, ascending, all of the model.
pub fn check_layers(kept: &[usize], layers: usize) -> Result<(), ShrinkError> {
    let why = match kept {
        [] => "none".to_owned(),
        _ => match (kept.windows(2).find(|w| w[0] >= w[1]), kept.last()) {
            (Some(w), _) => format!("{} stands before {}", w[0], w[1]),
            (None, Some(last)) if *last >= layers => format!("there is no block {last}"),
            _ => return Ok(()),
        },
    };
    Err(ShrinkError::Layers { why, layers })
}

/// What stays of the blocks in `layers`. Where a size is smaller than the model's, `measured` says what goes.
///
/// Each block keeps its own heads and channels, as all have one size: those with the largest activations, as Minitron
/// ranks them (<https://arxiv.org/abs/2407.14679>, section 2.2).
pub fn keep(
    config: &Config,
    layers: &[usize],
    sizes: Sizes,
    measured: Option<&Measured>,
) -> Result<Vec<KeptBlock>, ShrinkError> {
    check_layers(layers, config.num_hidden_layers)?;
    let kv_heads = sizes.num_key_value_heads.unwrap_or(config.num_key_value_heads);
    check_size("num_key_value_heads", kv_heads, config.num_key_value_heads)?;
    let group = config.num_attention_heads / config.num_key_value_heads;
    let heads = sizes.num_attention_heads.unwrap_or(group * kv_heads);
    let channels = sizes.intermediate_size.unwrap_or(config.intermediate_size);
    check_size("intermediate_size", channels, config.intermediate_size)?;
    check_size("num_attention_heads", heads, group * kv_heads)?;
    if !heads.is_multiple_of(kv_heads) {
        let why = format!("each of the {kv_heads} key and value heads must have as many");
        return Err(ShrinkError::Size {
            key: "num_attention_heads",
            size: heads,
            why,
        });
    }
    let whole = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
    );
    if measured.is_none() && (heads, kv_heads, channels) != whole {
        return Err(ShrinkError::Unmeasured);
    }
    let block = |layer: usize| {
        let mut kept = KeptBlock {
            layer,
            heads: (0..config.num_attention_heads).collect(),
            kv_heads: (0..config.num_key_value_heads).collect(),
            channels: (0..config.intermediate_size).collect(),
        };
        if let Some(measured) = measured {
            kept.channels = largest(&measured.channels[layer], channels);
            let scores = &measured.heads[layer];
            let groups: Vec<f64> = scores.chunks(group).map(|heads| heads.iter().sum()).collect();
            kept.kv_heads = largest(&groups, kv_heads);
            let of_group = |kv: &usize| {
                let first = kv * group;
                let best = largest(&scores[first..first + group], heads / kv_heads);
                best.into_iter().map(move |head| first + head)
            };
            kept.heads = kept.kv_heads.iter().flat_map(of_group).collect();
        }
        kept
    };
    Ok(layers.iter().map(|layer| block(*layer)).collect())
}

fn check_size(key: &'static str, size: usize, most: usize) -> Result<(), ShrinkError> {
    if (1..=most).contains(&size) {
        return Ok(());
    }
    let why = format!("it can be 1 to {most}");
    Err(ShrinkError::Size { key, size, why })
}

/// The places of the `count` largest numbers, ascending; of equals the first ones.
fn largest(numbers: &[f64], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..numbers.len()).collect();
    order.sort_by(|a, b| numbers[*b].total_cmp(&numbers[*a]));
    order.truncate(count);
    order.sort_unstable();
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_influential_blocks_stay_in_their_order() {
        assert_eq!(most_influential(&[0.5, 0.1, 0.3, 0.1], 3).unwrap(), [0, 1, 2]);
        assert_eq!(most_influential(&[0.1, 0.2, 0.3], 1).unwrap(), [2]);
        assert!(most_influential(&[0.1], 2).is_err() && most_influential(&[0.1], 0).is_err());
    }

    #[test]
    fn lists_of_blocks_that_cannot_be_meant_are_refused() {
        for (kept, text) in [
            (&[][..], "none"),
            (&[1, 0], "1 stands before 0"),
            (&[1, 1], "1 stands before 1"),
            (&[0, 3], "no block 3"),
        ] {
            let error = check_layers(kept, 3).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
        check_layers(&[0, 2], 3).unwrap();
    }
}
