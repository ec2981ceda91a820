//! The special tokens that have a role.

/// The identifiers of the special tokens, by role.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is the role in its name")]
pub struct SpecialIds {
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub unk: Option<u32>,
    pub sep: Option<u32>,
    pub pad: Option<u32>,
    pub mask: Option<u32>,
    /// The end of a turn, where it differs from the end of a text.
    pub eot: Option<u32>,
    /// The end of a message to a tool.
    pub eom: Option<u32>,
    /// Filling a gap in code: what stands before it, after it, in it.
    pub fim_pre: Option<u32>,
    pub fim_suf: Option<u32>,
    pub fim_mid: Option<u32>,
    pub fim_pad: Option<u32>,
    pub fim_rep: Option<u32>,
    pub fim_sep: Option<u32>,
}

/// Hugging Face's name of a role, and its GGUF key.
const ROLES: [(&str, &str); 14] = [
    ("bos", "tokenizer.ggml.bos_token_id"),
    ("eos", "tokenizer.ggml.eos_token_id"),
    ("unk", "tokenizer.ggml.unknown_token_id"),
    ("sep", "tokenizer.ggml.seperator_token_id"),
    ("pad", "tokenizer.ggml.padding_token_id"),
    ("mask", "tokenizer.ggml.mask_token_id"),
    ("eot", "tokenizer.ggml.eot_token_id"),
    ("eom", "tokenizer.ggml.eom_token_id"),
    ("fim_pre", "tokenizer.ggml.fim_pre_token_id"),
    ("fim_suf", "tokenizer.ggml.fim_suf_token_id"),
    ("fim_mid", "tokenizer.ggml.fim_mid_token_id"),
    ("fim_pad", "tokenizer.ggml.fim_pad_token_id"),
    ("fim_rep", "tokenizer.ggml.fim_rep_token_id"),
    ("fim_sep", "tokenizer.ggml.fim_sep_token_id"),
];

/// The roles that transformers knows, the first so many of [`ROLES`].
const OF_TRANSFORMERS: usize = 6;

impl SpecialIds {
    /// Every role: Hugging Face's name, the GGUF key, the identifier.
    pub fn roles(&self) -> impl Iterator<Item = (&'static str, &'static str, Option<u32>)> {
        let ids = [
            self.bos,
            self.eos,
            self.unk,
            self.sep,
            self.pad,
            self.mask,
            self.eot,
            self.eom,
            self.fim_pre,
            self.fim_suf,
            self.fim_mid,
            self.fim_pad,
            self.fim_rep,
            self.fim_sep,
        ];
        ROLES
            .into_iter()
            .zip(ids)
            .map(|((role, key), id)| (role, key, id))
    }

    /// Those that transformers has a name for, too.
    pub(super) fn of_transformers(&self) -> impl Iterator<Item = (&'static str, Option<u32>)> {
        self.roles().take(OF_TRANSFORMERS).map(|(role, _, id)| (role, id))
    }

    /// Every GGUF key with the place of its identifier.
    pub(super) fn slots(&mut self) -> impl Iterator<Item = (&'static str, &mut Option<u32>)> {
        let slots = [
            &mut self.bos,
            &mut self.eos,
            &mut self.unk,
            &mut self.sep,
            &mut self.pad,
            &mut self.mask,
            &mut self.eot,
            &mut self.eom,
            &mut self.fim_pre,
            &mut self.fim_suf,
            &mut self.fim_mid,
            &mut self.fim_pad,
            &mut self.fim_rep,
            &mut self.fim_sep,
        ];
        ROLES.into_iter().zip(slots).map(|((_, key), slot)| (key, slot))
    }
}
