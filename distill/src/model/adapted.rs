//! What an adapter needs to know of a model, and to change in it.

use candle_core::{Device, Result, Tensor};

use super::ops::frozen_embedding;
use super::{EmbeddingLora, HEAD, Lora, Mode, Model, Parameter, VirtualTokens, Weight};

/// A module that can carry a low-rank adapter, by its name in the checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Module<'a> {
    /// `model.layers.0.self_attn.q_proj`.
    pub name: &'a str,
    /// Whether it is a linear layer of a block; the embedding and the output layer are not.
    pub in_block: bool,
}

impl Model {
    /// Every module that can carry a low-rank adapter: the embedding, the linear layers, the output layer.
    pub fn modules(&self) -> Vec<Module<'_>> {
        let around = |name| Module {
            name,
            in_block: false,
        };
        let linears = self.linears().map(|linear| Module {
            name: linear.module(),
            in_block: true,
        });
        let embedding = std::iter::once(around(self.embed_tokens.module()));
        embedding.chain(linears).chain([around(HEAD)]).collect()
    }

    /// Whether a module is the embedding.
    pub fn is_embedding(&self, module: &str) -> bool {
        module == self.embed_tokens.module()
    }

    /// Whether a module is the output layer.
    pub fn is_head(&self, module: &str) -> bool {
        module == HEAD
    }

    /// The matrix of a module.
    pub fn matrix(&self, module: &str) -> Option<&Weight> {
        if self.is_embedding(module) {
            return Some(&self.embed_tokens.weight);
        }
        if self.is_head(module) {
            return Some(self.head.weight(&self.embed_tokens.weight));
        }
        let linear = self.linears().find(|linear| linear.module() == module)?;
        Some(&linear.weight)
    }

    /// Rows and columns of a module's matrix, `[out, in]`; zeros where there is no such module.
    pub fn dims(&self, module: &str) -> [usize; 2] {
        self.matrix(module).map_or([0, 0], Weight::dims)
    }

    /// Puts an adapter on a linear layer of a block or on the output layer; it must have such a module's sizes.
    pub(crate) fn set_lora(&mut self, module: &str, lora: Lora) {
        if self.is_head(module) {
            self.head.lora = Some(lora);
        } else if let Some(linear) = self.linears_mut().find(|linear| linear.module() == module) {
            linear.lora = Some(lora);
        }
    }

    /// Puts an adapter on the embedding.
    pub(crate) fn set_embedding_lora(&mut self, lora: EmbeddingLora) {
        self.embed_tokens.lora = Some(lora);
    }

    /// Puts virtual tokens before every sequence.
    pub(crate) fn set_virtual_tokens(&mut self, tokens: VirtualTokens) {
        self.virtual_tokens = Some(tokens);
    }

    /// What stands before every sequence.
    pub fn virtual_tokens(&self) -> Option<&VirtualTokens> {
        self.virtual_tokens.as_ref()
    }

    /// The modules with a low-rank adapter.
    pub fn adapted(&self) -> impl Iterator<Item = &str> {
        let embedding = self
            .embed_tokens
            .lora
            .as_ref()
            .map(|_| self.embed_tokens.module());
        let linears = self
            .linears()
            .filter(|linear| linear.lora.is_some())
            .map(|linear| linear.module());
        embedding
            .into_iter()
            .chain(linears)
            .chain(self.head.lora.as_ref().map(|_| HEAD))
    }

    /// The tensors of the low-rank adapters, in the order of the forward pass.
    pub fn adapter_parameters(&self) -> impl Iterator<Item = &Parameter> {
        let embedding = self.embed_tokens.lora.iter().flat_map(EmbeddingLora::parameters);
        let linears = self
            .linears()
            .filter_map(|linear| linear.lora.as_ref())
            .flat_map(Lora::parameters);
        embedding
            .chain(linears)
            .chain(self.head.lora.iter().flat_map(Lora::parameters))
    }

    /// The lengths of a module's rows under an adapter, `[out]`.
    pub(crate) fn norms(&self, module: &str, lora: &Lora) -> Result<Vec<f32>> {
        match self.matrix(module) {
            Some(weight) => lora.row_norms(&weight.frozen()),
            None => Ok(Vec::new()),
        }
    }

    /// The lengths of the embedding's columns under an adapter, `[hidden_size]`.
    pub(crate) fn embedding_norms(&self, lora: &EmbeddingLora) -> Result<Vec<f32>> {
        lora.column_norms(&self.embed_tokens.weight.frozen())
    }

    /// The embeddings of tokens without any adapter, as the first block gets them, `[tokens, hidden_size]`.
    pub(crate) fn embeddings_of(&self, ids: &[u32]) -> Result<Tensor> {
        self.scaled(frozen_embedding(&self.embed_tokens.weight.frozen(), &ids.into())?)
    }

    /// The names of all weights, quantised ones too.
    pub(crate) fn weight_names(&self) -> Vec<String> {
        let quantized = self
            .linears()
            .map(|linear| &linear.weight)
            .chain([&self.embed_tokens.weight]);
        let quantized = quantized
            .chain(&self.head.weight)
            .filter(|weight| weight.dense().is_none());
        let dense = self.weights().map(|weight| weight.name.as_str());
        dense
            .chain(quantized.map(Weight::name))
            .map(str::to_owned)
            .collect()
    }

    /// Makes the weights trained ones whose name `wanted` accepts. Where the output layer is the embedding and one of
    /// them is meant, they become two matrices.
    pub(crate) fn train(&mut self, wanted: &dyn Fn(&str) -> bool) -> Result<()> {
        let head = format!("{HEAD}.weight");
        if self.head.weight.is_none() && (wanted(&head) || wanted(self.embed_tokens.weight.name())) {
            self.head.weight = Some(self.embed_tokens.weight.copy(head)?);
        }
        for weight in self.matrices_mut().filter(|weight| wanted(weight.name())) {
            weight.train()?;
        }
        let biases = self.linears_mut().filter_map(|linear| linear.bias.as_mut());
        for bias in biases.filter(|bias| wanted(&bias.name)) {
            bias.train()?;
        }
        for norm in self.norms_mut().filter(|norm| wanted(&norm.name)) {
            norm.train()?;
        }
        Ok(())
    }

    /// Gives a weight the values that an adapter brings. The inner error is the shape that it must have, or none where
    /// the model has no such weight.
    pub(crate) fn replace(
        &mut self,
        name: &str,
        tensor: &Tensor,
    ) -> Result<std::result::Result<(), Option<Vec<usize>>>> {
        if name == format!("{HEAD}.weight") && self.head.weight.is_none() {
            // PEFT stores the shared matrix under both names.
            let shared = self.embed_tokens.weight.copy(name.to_owned())?;
            let same = |ours: &Parameter| -> Result<bool> {
                let values = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
                Ok(values(ours.get(Mode::INFERENCE))? == values(tensor)?)
            };
            if shared.dims() == tensor.dims() && shared.dense().map(same).transpose()? == Some(true) {
                return Ok(Ok(()));
            }
            self.head.weight = Some(shared);
        }
        if let Some(weight) = self.matrices_mut().find(|weight| weight.name() == name) {
            if weight.dims() != tensor.dims() {
                return Ok(Err(Some(weight.dims().to_vec())));
            }
            return weight.replace(tensor).map(Ok);
        }
        let known = self.weights().find(|weight| weight.name == name);
        let Some(dims) = known.map(|weight| weight.get(Mode::INFERENCE).dims().to_vec()) else {
            return Ok(Err(None));
        };
        if dims != tensor.dims() {
            return Ok(Err(Some(dims)));
        }
        let biases = self.linears_mut().filter_map(|linear| linear.bias.as_mut());
        for bias in biases.filter(|bias| bias.name == name) {
            bias.replace(tensor)?;
        }
        for norm in self.norms_mut().filter(|norm| norm.name == name) {
            norm.replace(tensor)?;
        }
        Ok(Ok(()))
    }

    fn matrices_mut(&mut self) -> impl Iterator<Item = &mut Weight> {
        let linears = self.layers.iter_mut().flat_map(|layer| layer.linears_mut());
        let linears = linears.map(|linear| &mut linear.weight);
        [&mut self.embed_tokens.weight]
            .into_iter()
            .chain(linears)
            .chain(&mut self.head.weight)
    }

    fn norms_mut(&mut self) -> impl Iterator<Item = &mut Parameter> {
        let layers = self.layers.iter_mut().flat_map(|layer| layer.norms_mut());
        layers.chain([&mut self.norm]).map(|norm| &mut norm.weight)
    }

    /// Where its numbers are.
    pub fn device(&self) -> &Device {
        self.norm.weight.get(Mode::INFERENCE).device()
    }
}
