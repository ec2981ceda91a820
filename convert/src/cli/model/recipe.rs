//! The options that say what the tensors become, spelled as `llama-quantize` spells them.

use std::path::{Path, PathBuf};

use pipit_convert::gguf::TensorType;
use pipit_convert::imatrix::Imatrix;
use pipit_convert::quantize::{self, FileType, Importance, QuantizeError, Recipe, TypeOverride};

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Quantisation")]
pub(super) struct RecipeArgs {
    /// What the matrices become, as llama-quantize spells it, in any case: F32, F16, BF16, Q8_0, Q6_K, Q5_K_M,
    /// Q4_K_M, Q4_0, IQ4_NL, ... (pipit-convert archs lists them). Vectors are always F32
    #[arg(short = 't', long = "type", value_name = "TYPE", default_value = "Q8_0", value_parser = FileType::from_name)]
    pub(super) file: FileType,
    /// Every matrix gets the same type, without the mix's exceptions
    #[arg(long)]
    pure: bool,
    /// Tensors whose name fits the expression get this type. Can be given several times; the first that fits counts
    #[arg(long = "tensor-type", value_name = "REGEX=TYPE", value_parser = TypeOverride::parse)]
    overrides: Vec<TypeOverride>,
    /// The type of output.weight, or of the embeddings where they are the output
    #[arg(long, value_name = "TYPE", value_parser = tensor_type)]
    output_tensor_type: Option<TensorType>,
    /// The type of the embeddings
    #[arg(long, value_name = "TYPE", value_parser = tensor_type)]
    token_embedding_type: Option<TensorType>,
    /// output.weight keeps the type that it has in the checkpoint
    #[arg(long)]
    leave_output_tensor: bool,
    /// An importance matrix (GGUF, or the older .dat), as pipit-convert imatrix and llama-imatrix write it
    #[arg(long, value_name = "F")]
    imatrix: Option<PathBuf>,
    /// Use it only for tensors whose name contains this. Can be given several times
    #[arg(
        long,
        value_name = "NAME",
        requires = "imatrix",
        conflicts_with = "exclude_weights"
    )]
    include_weights: Vec<String>,
    /// Do not use it for tensors whose name contains this. Can be given several times
    #[arg(long, value_name = "NAME", requires = "imatrix")]
    exclude_weights: Vec<String>,
}

fn tensor_type(name: &str) -> Result<TensorType, QuantizeError> {
    quantize::tensor_type(name)
}

impl RecipeArgs {
    /// The file with the importance matrix.
    pub(super) fn imatrix(&self) -> Option<&Path> {
        self.imatrix.as_deref()
    }

    pub(super) fn recipe(&self) -> anyhow::Result<Recipe> {
        Ok(Recipe {
            file: self.file,
            pure: self.pure,
            overrides: self.overrides.clone(),
            output_type: self.output_tensor_type,
            embedding_type: self.token_embedding_type,
            leave_output: self.leave_output_tensor,
            imatrix: self.imatrix().map(|path| self.importance(path)).transpose()?,
        })
    }

    fn importance(&self, path: &Path) -> anyhow::Result<Importance> {
        let mut importance = Imatrix::open(path)?.importance(&path.to_string_lossy());
        if !self.include_weights.is_empty() {
            importance.include(&self.include_weights);
        }
        importance.exclude(&self.exclude_weights);
        Ok(importance)
    }
}
