//! Memory of a training run: by part, estimated beforehand, and what the system counts.
//!
//! The estimate counts what the forward pass keeps for the backward pass.
//! docs/train/report.md compares it with real runs.

use serde::{Deserialize, Serialize};

/// Bytes of one number.
const F32: u64 = 4;

/// The sizes of a model and of a run that memory depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sizes {
    /// Blocks.
    pub layers: usize,
    /// The width of the hidden states.
    pub hidden: usize,
    /// The width of the feed-forward layer.
    pub intermediate: usize,
    /// Numbers that all blocks together keep for each row.
    pub kept: usize,
    /// Tokens that the output layer knows.
    pub vocabulary: usize,
    /// Bytes of the frozen and trained weights of the checkpoint.
    pub weights: u64,
    /// Numbers that are trained and belong to the checkpoint.
    pub trained_weights: u64,
    /// Numbers of adapters.
    pub adapters: u64,
    /// Bytes of a teacher's weights.
    pub teacher: u64,
    /// Bytes of AdamW's moments.
    pub optimizer: u64,
    /// Whether the embedding is trained and is the output layer too: it gets two gradients, which are added.
    pub tied_and_trained: bool,
    /// Rows of the largest forward pass: its tokens, virtual ones among them.
    pub rows: usize,
    /// Whether activations are computed again in the backward pass: of each block its input is kept, and all only of
    /// the block at hand.
    pub recompute: bool,
    /// Whether several forward passes make one step: their gradients are added.
    pub accumulation: bool,
    /// Numbers of gradients that exist at a time where weights move as soon as they can; none where all wait.
    pub at_once: Option<u64>,
    /// Rows of the output layer that are computed at a time.
    pub loss_chunk: usize,
    /// Whether hidden states have 16 bits.
    pub half: bool,
    /// Scores of one layer's attention that exist together; 0 where they are computed block by block.
    pub scores: usize,
}

/// Where the memory goes at the moment at which most is needed, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPlan {
    /// The program, the tokenizer and the data, as they are in memory already.
    pub program_bytes: u64,
    /// The checkpoint's weights.
    pub weights_bytes: u64,
    /// The adapters.
    pub adapters_bytes: u64,
    /// The teacher's weights, pages of its file among them.
    #[serde(default, skip_serializing_if = "is_none")]
    pub teacher_bytes: u64,
    /// The gradients of what is trained.
    pub gradients_bytes: u64,
    /// AdamW's two moments of what is trained.
    pub optimizer_bytes: u64,
    /// What the forward pass keeps for the backward pass.
    pub activations_bytes: u64,
    /// A chunk of logits, or what the backward pass works with: the larger of them.
    pub working_bytes: u64,
    /// The most that was taken while the model was read, pages of its file among it.
    pub loading_bytes: u64,
    /// The sum of the parts, or what loading took where that is more.
    pub peak_bytes: u64,
}

impl Sizes {
    /// The memory of a run of these sizes in a program that takes `program` bytes beside its weights, and took
    /// `loading` bytes at most so far.
    pub fn plan(&self, program: u64, loading: u64) -> MemoryPlan {
        let rows = self.rows as u64;
        let of_blocks = match self.recompute {
            false => self.kept,
            true => self.layers * self.hidden + self.kept / self.layers.max(1),
        };
        // The embedding's result and the last norm's stand beside the blocks.
        let per_row = of_blocks + 2 * self.hidden;
        let trained = self.trained_weights + self.adapters;
        let copies = if self.accumulation { 2 } else { 1 };
        let gradients = self.at_once.unwrap_or(trained * copies);
        let embedding = (self.vocabulary * self.hidden) as u64;
        let logits = (self.loss_chunk.min(self.rows) * self.vocabulary) as u64;
        // The gradients that flow between two layers, and those by the last hidden states.
        let flowing = rows * (3 * self.intermediate + 4 * self.hidden) as u64;
        // Two gradients of one embedding, and their sum.
        let adding = if self.tied_and_trained { 2 * embedding } else { 0 };
        let hidden_bytes = if self.half { 2 } else { F32 };
        // The scores, their exponentials and probabilities, and the gradients of these.
        let scores = 6 * self.scores as u64;
        let mut plan = MemoryPlan {
            program_bytes: program,
            weights_bytes: self.weights,
            adapters_bytes: F32 * self.adapters,
            teacher_bytes: self.teacher,
            gradients_bytes: F32 * gradients,
            optimizer_bytes: self.optimizer,
            activations_bytes: hidden_bytes * rows * per_row as u64,
            working_bytes: F32 * logits.max(flowing).max(adding).max(scores),
            loading_bytes: loading,
            peak_bytes: 0,
        };
        let parts: u64 = plan.parts().iter().map(|(_, bytes)| bytes).sum();
        plan.peak_bytes = parts.max(loading);
        plan
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn is_none(bytes: &u64) -> bool {
    *bytes == 0
}

impl MemoryPlan {
    /// The parts with their names.
    pub fn parts(&self) -> [(&'static str, u64); 8] {
        [
            ("program, tokenizer and data", self.program_bytes),
            ("weights", self.weights_bytes),
            ("adapters", self.adapters_bytes),
            ("teacher", self.teacher_bytes),
            ("gradients", self.gradients_bytes),
            ("optimizer", self.optimizer_bytes),
            ("activations", self.activations_bytes),
            ("logits and backward pass", self.working_bytes),
        ]
    }
}

/// What the system says of this program's memory, in bytes. Linux only; elsewhere nothing is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resident {
    /// In memory now, without pages of files (a checkpoint that was read may be forgotten at once).
    pub now: u64,
    /// The most that ever was, with pages of files.
    pub peak: u64,
}

/// The resident memory of this program.
pub fn resident() -> Option<Resident> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    Some(Resident {
        now: kibibytes(&status, "RssAnon:")?,
        peak: kibibytes(&status, "VmHWM:")?,
    })
}

/// The memory that programs may still take without swapping, in bytes.
pub fn available() -> Option<u64> {
    kibibytes(&std::fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")
}

/// The bytes of a line `KEY   123 kB`.
fn kibibytes(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_grow_with_what_they_depend_on() {
        let lora = Sizes {
            layers: 30,
            hidden: 576,
            intermediate: 1536,
            kept: 10_368 * 30 + 3360,
            vocabulary: 49152,
            weights: 4 * 134_515_008,
            adapters: 4_884_480,
            rows: 512,
            loss_chunk: 128,
            ..Sizes::default()
        };
        let plan = lora.plan(0, 0);
        assert_eq!(plan.gradients_bytes, plan.adapters_bytes);
        assert_eq!(plan.activations_bytes, 4 * 512 * (10_368 * 30 + 1152 + 3360));
        let longer = Sizes { rows: 1024, ..lora }.plan(0, 0);
        assert_eq!(longer.activations_bytes, 2 * plan.activations_bytes);
        assert_eq!(longer.weights_bytes, plan.weights_bytes);
        let recomputed = Sizes {
            recompute: true,
            ..lora
        };
        let kept = 30 * 576 + 10_368 + 112 + 1152;
        assert_eq!(recomputed.plan(0, 0).activations_bytes, 4 * 512 * kept);
        let at_once = Sizes {
            at_once: Some(5),
            ..lora
        }
        .plan(0, 0);
        assert_eq!(at_once.gradients_bytes, 20);
        let summed = Sizes {
            accumulation: true,
            ..lora
        }
        .plan(7, 0);
        assert_eq!(summed.peak_bytes - plan.peak_bytes, plan.gradients_bytes + 7);
        assert_eq!(lora.plan(0, u64::MAX).peak_bytes, u64::MAX);
        let on_gpu = Sizes {
            half: true,
            scores: 4 * 9 * 512 * 512,
            ..lora
        };
        assert_eq!(2 * on_gpu.plan(0, 0).activations_bytes, plan.activations_bytes);
        assert_eq!(on_gpu.plan(0, 0).working_bytes, 4 * 6 * 4 * 9 * 512 * 512);
    }

    #[test]
    fn the_system_says_what_is_used() {
        let text = "VmHWM:\t  20 kB\nRssAnon:\t 8 kB\n";
        assert_eq!(kibibytes(text, "RssAnon:"), Some(8192));
        assert_eq!(kibibytes("RssAnon: many kB", "RssAnon:"), None);
        #[cfg(target_os = "linux")]
        {
            let before = resident().unwrap();
            let held = vec![1u8; 32 << 20];
            let after = resident().unwrap();
            assert!(held[1 << 20] == 1 && after.now >= before.now + (30 << 20));
            assert!(after.peak >= after.now && available().is_some());
        }
    }
}
