//! Adapters merged into the weights, in f32, in the order in which they are given.
//!
//! In: rows of the checkpoint's tensors, before any reordering for the GGUF file. Out: the same rows with all adapters
//! in them. What an adapter does to a tensor is a list of steps. PEFT's `merge_and_unload` does the
//! same with whole matrices and in the checkpoint's own precision (peft/tuners/lora/layer.py); here the sum stays f32
//! until it is quantised.

mod step;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value as Json};
use step::Step;
pub use step::{LowRank, add_low_rank};

use crate::adapter::PeftAdapter;
use crate::arch::{ArchError, Architecture, TensorRule};
use crate::checkpoint::CheckpointError;

/// The embeddings, and the output that may be the same tensor.
const EMBEDDINGS: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// An adapter with the factor that the user gives it.
#[derive(Debug)]
pub struct ScaledAdapter {
    /// The adapter.
    pub adapter: PeftAdapter,
    /// Times its own scale.
    pub scale: f32,
}

/// What can be wrong between adapters and a checkpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MergeError {
    /// The checkpoint has no such tensor.
    #[error(
        "{adapter} adapts {tensor}, which this checkpoint does not have\nhint: was the adapter trained on another base? Its configuration names {base}"
    )]
    NoTensor {
        /// The adapter's folder.
        adapter: PathBuf,
        /// The tensor.
        tensor: String,
        /// `base_model_name_or_path`.
        base: String,
    },
    /// The tensor has other sizes.
    #[error(
        "{adapter}: {tensor} is {found:?} in the adapter and {wanted:?} in this checkpoint\nhint: was the adapter trained on another base? Its configuration names {base}"
    )]
    Shape {
        /// The adapter's folder.
        adapter: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shape that the adapter has.
        found: Vec<usize>,
        /// The shape in the checkpoint.
        wanted: Vec<usize>,
        /// `base_model_name_or_path`.
        base: String,
    },
    /// A token that the adapter trained is not in the vocabulary.
    #[error("{adapter}: it has a row for token {token} of {tensor}, which has {rows} rows")]
    Token {
        /// The adapter's folder.
        adapter: PathBuf,
        /// The tensor.
        tensor: String,
        /// The token.
        token: usize,
        /// The number of rows.
        rows: usize,
    },
    /// A factor was given to an adapter that brings whole tensors.
    #[error(
        "{adapter} brings {tensor} whole, and that cannot be scaled by {scale}\nhint: give the adapter without =SCALE"
    )]
    Scaled {
        /// The adapter's folder.
        adapter: PathBuf,
        /// The tensor.
        tensor: String,
        /// The factor.
        scale: f32,
    },
    /// The adapter changes the number of tokens and does not say which tokens they are.
    #[error(
        "{adapter} brings embeddings of {rows} tokens, where the checkpoint has {had}, and no tokenizer.json\nhint: put the tokenizer that it was trained with into its folder"
    )]
    Tokenizer {
        /// The adapter's folder.
        adapter: PathBuf,
        /// The number of tokens.
        rows: usize,
        /// That of the checkpoint.
        had: usize,
    },
    /// Embeddings and output are one tensor in this architecture, and the adapter makes two of them.
    #[error(
        "{adapter} changes the embeddings and the output of the model differently, and a {arch} model has one tensor for both"
    )]
    Tied {
        /// The adapter's folder.
        adapter: PathBuf,
        /// The architecture.
        arch: &'static str,
    },
    /// A tensor of the adapter cannot be read.
    #[error(transparent)]
    Read(#[from] CheckpointError),
    /// What the adapters make of the configuration does not make sense.
    #[error(transparent)]
    Arch(#[from] ArchError),
}

/// All adapters, by the name of the tensor that they change.
#[derive(Debug)]
pub struct Merge<'a> {
    steps: BTreeMap<String, Vec<Step<'a>>>,
    config: Map<String, Json>,
    rules: Vec<TensorRule>,
    vocabulary: Option<&'a Path>,
}

/// What an adapter does to one tensor, and which adapter.
struct Change<'a> {
    adapter: &'a PeftAdapter,
    tensor: String,
    step: Step<'a>,
}

impl<'a> Merge<'a> {
    /// Checks that every part of every adapter fits a tensor of the checkpoint.
    pub fn new(
        adapters: &'a [ScaledAdapter],
        arch: &'static Architecture,
        config: &Map<String, Json>,
    ) -> Result<Self, MergeError> {
        let before = (arch.tensors)(config)?;
        let mut merge = Self {
            steps: BTreeMap::new(),
            config: config.clone(),
            rules: before.clone(),
            vocabulary: None,
        };
        let mut changes = Vec::new();
        for scaled in adapters {
            changes.extend(changes_of(scaled)?);
        }
        merge.resize(&changes)?;
        merge.untie(arch, &mut changes)?;
        for Change {
            adapter,
            tensor,
            step,
        } in changes
        {
            merge.check(&before, adapter, &tensor, &step)?;
            merge.steps.entry(tensor).or_default().push(step);
        }
        Ok(merge)
    }

    /// The configuration, after the adapters: an output of its own, more tokens.
    pub fn config(&self) -> &Map<String, Json> {
        &self.config
    }

    /// The tensors of the model, after the adapters.
    pub fn rules(&self) -> &[TensorRule] {
        &self.rules
    }

    /// The folder whose tokenizer counts, if it is an adapter's.
    pub fn vocabulary(&self) -> Option<&'a Path> {
        self.vocabulary
    }

    /// Whether any adapter changes the tensor.
    pub fn changes(&self, tensor: &str) -> bool {
        self.steps.contains_key(tensor)
    }

    /// Whether an adapter brings the tensor whole, so that the checkpoint's is not needed.
    pub fn replaces(&self, tensor: &str) -> bool {
        let steps = self.steps.get(tensor);
        steps.is_some_and(|steps| steps.iter().any(|step| matches!(step, Step::Replace(_))))
    }

    /// Learns what can only be known from the whole tensor. To be called once before [`Merge::apply`] where the tensor
    /// is of `rows` rows of `columns` elements; `read` gives the checkpoint's rows from a number on.
    pub fn prepare<E: From<MergeError>>(
        &self,
        tensor: &str,
        (rows, columns): (usize, usize),
        read: impl Fn(usize, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        let steps = self.steps.get(tensor).map_or(&[][..], Vec::as_slice);
        for (at, step) in steps.iter().enumerate() {
            let Some((module, scale, lengths)) = step.needs_columns() else {
                continue;
            };
            let mut squares = vec![0.0f64; columns];
            let mut values = Vec::new();
            // The slabs have one size, so that the sum does not depend on the number of threads.
            const SLAB: usize = 256;
            for first in (0..rows).step_by(SLAB) {
                values.resize(SLAB.min(rows - first) * columns, 0.0);
                if !self.replaces(tensor) {
                    read(first, &mut values)?;
                }
                let row = |row| first + row;
                for step in &steps[..at] {
                    step.apply(row, columns, &mut values).map_err(MergeError::from)?;
                }
                step::add_low_rank(module.into(), scale, row, columns, &mut values);
                for row in values.chunks_exact(columns) {
                    for (sum, value) in squares.iter_mut().zip(row) {
                        *sum += f64::from(*value).powi(2);
                    }
                }
            }
            // A second call finds the same lengths: it changes nothing.
            let _ = lengths.set(squares.iter().map(|sum| sum.sqrt() as f32).collect());
        }
        Ok(())
    }

    /// Puts all adapters into some rows of a tensor. `row` says which row of the checkpoint the n-th is.
    pub fn apply(
        &self,
        tensor: &str,
        row: impl Fn(usize) -> usize,
        columns: usize,
        values: &mut [f32],
    ) -> Result<(), MergeError> {
        for step in self.steps.get(tensor).into_iter().flatten() {
            step.apply(&row, columns, values)?;
        }
        Ok(())
    }

    /// Embeddings of another length make another vocabulary.
    fn resize(&mut self, changes: &[Change<'a>]) -> Result<(), MergeError> {
        let had = self.rules.iter().find(|rule| rule.hf == EMBEDDINGS);
        let had = had.and_then(|rule| rule.shape.first().copied()).unwrap_or(0);
        for change in changes.iter().filter(|change| change.tensor == EMBEDDINGS) {
            let Step::Replace(view) = &change.step else {
                continue;
            };
            let Some(&rows) = view.shape.first().filter(|rows| **rows != had) else {
                continue;
            };
            if !change.adapter.dir().join("tokenizer.json").is_file() {
                return Err(MergeError::Tokenizer {
                    adapter: change.adapter.dir().to_path_buf(),
                    rows,
                    had,
                });
            }
            self.vocabulary = Some(change.adapter.dir());
            self.config.insert("vocab_size".into(), rows.into());
        }
        Ok(())
    }

    /// A model whose output is its embeddings keeps it so as long as both change alike; else it gets an output of its
    /// own, which starts as a copy of the embeddings. That is the model that was trained: an adapter on one of the two
    /// leaves the other as it was (PEFT's merge changes both).
    fn untie(
        &mut self,
        arch: &'static Architecture,
        changes: &mut Vec<Change<'a>>,
    ) -> Result<(), MergeError> {
        self.rules = (arch.tensors)(&self.config)?;
        if self.rules.iter().any(|rule| rule.hf == HEAD) {
            return Ok(());
        }
        let of = |tensor: &str| -> Vec<&Change<'_>> {
            let of = |change: &&Change<'_>| change.tensor == tensor;
            changes.iter().filter(of).collect()
        };
        let (embeddings, head) = (of(EMBEDDINGS), of(HEAD));
        let trained_rows = |change: &Change<'_>| matches!(change.step, Step::Rows(_));
        let alike = embeddings.len() == head.len()
            && embeddings.iter().zip(&head).all(|(a, b)| a.step.is_as(&b.step));
        if alike || head.is_empty() && embeddings.iter().all(|change| trained_rows(change)) {
            changes.retain(|change| change.tensor != HEAD);
            return Ok(());
        }
        let adapter = head.first().or(embeddings.first()).map(|change| change.adapter);
        // Trained rows are those of the output too, as in PEFT.
        let rows: Vec<_> = changes
            .iter()
            .filter(|change| change.tensor == EMBEDDINGS && trained_rows(change))
            .map(|change| Change {
                adapter: change.adapter,
                tensor: HEAD.to_owned(),
                step: change.step.clone(),
            })
            .collect();
        changes.extend(rows);
        self.config.insert("tie_word_embeddings".into(), false.into());
        self.rules = (arch.tensors)(&self.config)?;
        if self.rules.iter().any(|rule| rule.hf == HEAD) {
            return Ok(());
        }
        Err(MergeError::Tied {
            adapter: adapter
                .map(|adapter| adapter.dir().to_path_buf())
                .unwrap_or_default(),
            arch: arch.name,
        })
    }

    fn check(
        &self,
        before: &[TensorRule],
        adapter: &PeftAdapter,
        tensor: &str,
        step: &Step<'_>,
    ) -> Result<(), MergeError> {
        let base = || {
            let base = adapter.config().base_model_name_or_path.clone();
            base.unwrap_or_else(|| "none".into())
        };
        let shape = |rules: &[TensorRule], name: &str| {
            let rule = rules.iter().find(|rule| rule.hf == name);
            rule.map(|rule| rule.shape.clone())
        };
        let wanted = shape(&self.rules, tensor).ok_or_else(|| MergeError::NoTensor {
            adapter: adapter.dir().to_path_buf(),
            tensor: tensor.to_owned(),
            base: base(),
        })?;
        let wrong = |found: Vec<usize>, wanted: Vec<usize>| MergeError::Shape {
            adapter: adapter.dir().to_path_buf(),
            tensor: tensor.to_owned(),
            found,
            wanted,
            base: base(),
        };
        if let Step::Rows(tokens) = step {
            let rows = wanted.first().copied().unwrap_or(0);
            if let Some(token) = tokens.rows.keys().find(|token| **token >= rows) {
                return Err(MergeError::Token {
                    adapter: adapter.dir().to_path_buf(),
                    tensor: tensor.to_owned(),
                    token: *token,
                    rows,
                });
            }
        }
        let found = step.shape(&wanted);
        if found != wanted {
            return Err(wrong(found, wanted));
        }
        // A resized tensor must come from the adapter, before anything is added to it.
        let here = shape(before, tensor).or_else(|| shape(before, EMBEDDINGS));
        let replaced = matches!(step, Step::Replace(_)) || self.replaces(tensor);
        match here.filter(|here| *here != wanted && !replaced) {
            Some(here) => Err(wrong(wanted, here)),
            None => Ok(()),
        }
    }
}

/// What one adapter does, tensor by tensor: whole tensors first, as PEFT loads them, then trained rows and matrices.
fn changes_of(scaled: &ScaledAdapter) -> Result<Vec<Change<'_>>, MergeError> {
    let ScaledAdapter { adapter, scale } = scaled;
    let mut changes = Vec::new();
    let mut add = |tensor: String, step| {
        changes.push(Change {
            adapter,
            tensor,
            step,
        });
    };
    let whole = |tensor: &str| MergeError::Scaled {
        adapter: adapter.dir().to_path_buf(),
        tensor: tensor.to_owned(),
        scale: *scale,
    };
    for (tensor, view) in adapter.replaced() {
        if *scale != 1.0 {
            return Err(whole(tensor));
        }
        view.check_dtype()?;
        add(tensor.to_owned(), Step::Replace(view));
    }
    for (module, rows) in adapter.tokens() {
        if *scale != 1.0 {
            return Err(whole(module));
        }
        add(format!("{module}.weight"), Step::Rows(rows));
    }
    for (name, module) in adapter.modules() {
        let scale = scale * module.scale;
        add(format!("{name}.weight"), Step::low_rank(module, scale));
        if let Some(bias) = &module.bias {
            add(format!("{name}.bias"), Step::Add { values: bias, scale });
        }
    }
    Ok(changes)
}
