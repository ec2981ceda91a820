//! What the user asks for, and what each tensor gets: the mix's type, an override, or a fallback.
//!
//! Source: llama.cpp, src/llama-quant.cpp, `llama_tensor_get_type` and what calls it.

use std::cmp::Ordering;

use regex::Regex;

use super::category::{self, Category};
use super::mix::{Mix, ModelFacts, Seen};
use super::{FileType, Importance, QuantizeError, is_target};
use crate::gguf::TensorType;

/// How a file is to be quantised: the options of `llama-quantize`.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// The mix.
    pub file: FileType,
    /// Every tensor gets the mix's own type.
    pub pure: bool,
    /// Tensors by name, with the type that they get instead of the mix's. The first pattern that fits counts.
    pub overrides: Vec<TypeOverride>,
    /// The type of output.weight, or of the embeddings where they are the output.
    pub output_type: Option<TensorType>,
    /// The type of the embeddings.
    pub embedding_type: Option<TensorType>,
    /// output.weight stays in the type that the checkpoint has.
    pub leave_output: bool,
    /// The importance matrix.
    pub imatrix: Option<Importance>,
}

impl Recipe {
    /// The mix without any options.
    pub fn new(file: FileType) -> Self {
        Self {
            file,
            pure: false,
            overrides: Vec::new(),
            output_type: None,
            embedding_type: None,
            leave_output: false,
            imatrix: None,
        }
    }
}

/// `--tensor-type REGEX=TYPE`.
#[derive(Debug, Clone)]
pub struct TypeOverride {
    pattern: Regex,
    kind: TensorType,
}

impl TypeOverride {
    /// Reads `REGEX=TYPE`. The expression may fit anywhere in the name; its letters are taken small, as
    /// `llama-quantize` does.
    pub fn parse(text: &str) -> Result<Self, QuantizeError> {
        let bad = |why: String| QuantizeError::Override {
            text: text.to_owned(),
            why,
        };
        let (pattern, kind) = text
            .split_once('=')
            .filter(|(pattern, _)| !pattern.is_empty())
            .ok_or_else(|| bad("it is not REGEX=TYPE".into()))?;
        let pattern = pattern.to_ascii_lowercase();
        Ok(Self {
            kind: tensor_type(kind)?,
            pattern: Regex::new(&pattern).map_err(|e| bad(e.to_string()))?,
        })
    }
}

/// The tensor type that a user names, in any case.
pub fn tensor_type(name: &str) -> Result<TensorType, QuantizeError> {
    match TensorType::from_name(name) {
        Some(kind) if is_target(kind) => Ok(kind),
        Some(kind) => Err(QuantizeError::NoTarget { name: kind.name() }),
        None => Err(QuantizeError::UnknownTensorType {
            name: name.to_owned(),
        }),
    }
}

/// A tensor that needs a type.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// The name in the GGUF file.
    pub name: &'a str,
    /// The dimensions in ggml's order.
    pub dimensions: &'a [u64],
    /// The type that it has in the checkpoint.
    pub stored: TensorType,
    /// Whether llama.cpp's converter writes it as F32 whatever the user asks for.
    pub always_f32: bool,
}

/// The type of a tensor, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// What it gets.
    pub kind: TensorType,
    /// What it would have got if its rows were whole blocks.
    pub asked: TensorType,
    /// The rule that chose `asked`; nothing where it is the file's own type.
    pub rule: Option<String>,
    /// The kernels cannot do it well without an importance matrix.
    pub needs_imatrix: bool,
}

impl Choice {
    /// Why `kind` is not `asked`, if it is not.
    pub fn fallback(&self, columns: u64) -> Option<String> {
        let block = self.asked.block_elements();
        (self.kind != self.asked).then(|| format!("rows of {columns} are no whole blocks of {block}"))
    }
}

impl Recipe {
    /// The importance matrix, if there is anything in it.
    pub fn importance(&self) -> Option<&Importance> {
        self.imatrix
            .as_ref()
            .filter(|imatrix| !imatrix.weights.is_empty())
    }

    /// The types of all tensors of a model, in the order given. (The mixes count layers: llama.cpp visits the
    /// tensors by layer and name, and so does this.)
    pub fn choose(
        &self,
        facts: &ModelFacts,
        tensors: &[Candidate<'_>],
    ) -> Result<Vec<Choice>, QuantizeError> {
        if let (false, Some(first)) = (self.file.is_quantised(), self.overrides.first()) {
            return Err(QuantizeError::Override {
                text: format!("{}={}", first.pattern, first.kind),
                why: format!("a file of {} has no mix to override", self.file),
            });
        }
        let categories = tensors.iter().map(|tensor| Category::of(tensor.name));
        let mut mix = Mix {
            file: self.file,
            facts,
            has_imatrix: self.importance().is_some(),
            tied: !tensors.iter().any(|tensor| tensor.name == "output.weight"),
            output_type: self.output_type,
            embedding_type: self.embedding_type,
            attn_v: categories.filter(|c| *c == Category::AttnV).count(),
            seen: Seen::default(),
        };
        let mut order: Vec<usize> = (0..tensors.len()).collect();
        order.sort_by(|a, b| by_layer_and_name(tensors[*a].name, tensors[*b].name));
        let mut choices = vec![None; tensors.len()];
        for at in order {
            choices[at] = Some(self.choose_one(&mut mix, &tensors[at])?);
        }
        Ok(choices.into_iter().flatten().collect())
    }

    fn choose_one(&self, mix: &mut Mix<'_>, tensor: &Candidate<'_>) -> Result<Choice, QuantizeError> {
        let fixed = |kind, rule: &str| Choice {
            kind,
            asked: kind,
            rule: Some(rule.to_owned()),
            needs_imatrix: false,
        };
        if let Some(why) = category::kept(tensor.name, tensor.dimensions) {
            return Ok(fixed(TensorType::F32, why));
        }
        if tensor.always_f32 {
            return Ok(fixed(TensorType::F32, "always F32"));
        }
        let category = Category::of(tensor.name);
        if self.leave_output && category == Category::Output {
            return Ok(fixed(tensor.stored, "--leave-output-tensor"));
        }
        let columns = tensor.dimensions.first().copied().unwrap_or(1);
        let (asked, rule) = self.before_shape(mix, tensor.name, category, columns);
        let kind = fitting(asked, columns).ok_or_else(|| QuantizeError::NoFallback {
            tensor: tensor.name.to_owned(),
            columns,
            kind: asked.name(),
        })?;
        Ok(Choice {
            kind,
            asked,
            rule,
            needs_imatrix: needs_imatrix(category, kind, self.file),
        })
    }

    fn before_shape(
        &self,
        mix: &mut Mix<'_>,
        name: &str,
        category: Category,
        columns: u64,
    ) -> (TensorType, Option<String>) {
        let named = self.overrides.iter().find(|o| o.pattern.is_match(name));
        // The table of per-layer embeddings may be named; others follow the option.
        let own_option = name == "token_embd.weight" || named.is_none();
        match (category, self.embedding_type, self.output_type) {
            (Category::TokenEmbd, Some(kind), _) if own_option => {
                return (kind, Some("--token-embedding-type".into()));
            }
            (Category::Output, _, Some(kind)) => return (kind, Some("--output-tensor-type".into())),
            _ => {}
        }
        if !self.file.is_quantised() {
            return (self.file.default_type(), None);
        }
        if let Some(TypeOverride { pattern, kind }) = named {
            return (*kind, Some(format!("--tensor-type {pattern}")));
        }
        if self.pure {
            return (self.file.default_type(), None);
        }
        let (kind, rule) = mix.choose(category, columns);
        (kind, rule.map(str::to_owned))
    }
}

/// `llama_model_loader::weight_name_comparer`: tensors outside the layers first, then layer by layer.
fn by_layer_and_name(a: &str, b: &str) -> Ordering {
    (category::layer(a), a).cmp(&(category::layer(b), b))
}

/// `kind`, or where rows of `columns` are no whole number of its blocks, what llama.cpp takes instead
/// (`tensor_type_fallback`); nothing where it knows nothing.
fn fitting(kind: TensorType, columns: u64) -> Option<TensorType> {
    use TensorType as T;
    let fits = |kind: TensorType| columns.is_multiple_of(kind.block_elements());
    if fits(kind) {
        return Some(kind);
    }
    let smaller = match kind {
        T::IQ1_S | T::IQ1_M | T::IQ2_XXS | T::IQ2_XS | T::IQ2_S | T::IQ3_XXS | T::IQ3_S | T::IQ4_XS => {
            T::IQ4_NL
        }
        T::Q2_0 | T::Q2_K | T::Q3_K | T::TQ1_0 | T::TQ2_0 => T::Q4_0,
        T::Q4_K => T::Q5_0,
        T::Q5_K => T::Q5_1,
        T::Q6_K => T::Q8_0,
        _ if kind.block_elements() <= 32 => kind,
        _ => return None,
    };
    Some(if fits(smaller) { smaller } else { T::F16 })
}

/// Where llama.cpp refuses to go on without an importance matrix (`tensor_requires_imatrix`), and where its kernels
/// would abort (`ggml_quantize_requires_imatrix`).
fn needs_imatrix(category: Category, kind: TensorType, file: FileType) -> bool {
    use TensorType as T;
    if matches!(kind, T::IQ2_XXS | T::IQ2_XS | T::IQ1_S) {
        return true;
    }
    if matches!(category, Category::TokenEmbd | Category::Output) {
        return false;
    }
    matches!(kind, T::IQ3_XXS | T::IQ2_S | T::IQ1_M) || kind == T::Q2_K && file == FileType::Q2_K_S
}
