//! The options that say what the tensors become, spelled as `llama-quantize` spells them.

use pipit_convert::gguf::TensorType;
use pipit_convert::quantize::{self, FileType, QuantizeError, Recipe, TypeOverride};

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
}

fn tensor_type(name: &str) -> Result<TensorType, QuantizeError> {
    quantize::tensor_type(name)
}

impl RecipeArgs {
    pub(super) fn recipe(&self) -> Recipe {
        Recipe {
            file: self.file,
            pure: self.pure,
            overrides: self.overrides.clone(),
            output_type: self.output_tensor_type,
            embedding_type: self.token_embedding_type,
            leave_output: self.leave_output_tensor,
            imatrix: None,
        }
    }
}
