//! The special tokens that have a role, and how they are found in a folder.

use serde_json::{Map, Value as Json};

use super::CONTROL;
use super::added::Added;

/// The tokens that llama.cpp takes for the end of a turn (llama-vocab.cpp, `load`), the likeliest first.
const END_OF_TURN: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
];

/// Further tokens that end generation by their text alone.
const ENDS_BY_TEXT: &[&str] = &[
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "</s>",
    "<|eom_id|>",
    "[EOS]",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "[e~[",
];

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
    /// As `SpecialVocab` finds them: by text in tokenizer_config.json, else by number in config.json.
    pub(super) fn find(
        tokenizer_config: &Map<String, Json>,
        added: &[Added],
        config: &Map<String, Json>,
        tokens: &[String],
    ) -> Self {
        let text = |role: &str| {
            let entry = tokenizer_config.get(&format!("{role}_token"))?;
            entry.as_str().or_else(|| entry.get("content")?.as_str())
        };
        let find = |role: &str, other: Option<&str>| {
            let text = text(role).or_else(|| other.and_then(text));
            let by_text = text.and_then(|text| {
                let added = added.iter().find(|token| token.content == text);
                added
                    .map(|token| token.id)
                    .or_else(|| tokens.iter().position(|token| token == text).map(|id| id as u64))
            });
            let by_number = || config.get(&format!("{role}_token_id")).and_then(Json::as_u64);
            by_text.or_else(by_number).and_then(|id| u32::try_from(id).ok())
        };
        Self {
            bos: find("bos", Some("cls")),
            eos: find("eos", Some("sep")),
            unk: find("unk", None),
            sep: find("sep", None),
            pad: find("pad", None),
            mask: find("mask", None),
            eot: find("eot", None),
            eom: find("eom", None),
            ..Self::default()
        }
    }

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

    /// Names the ends of generation that llama.cpp would not find, or not always the same way.
    pub(super) fn name_ends(&mut self, generation: &Map<String, Json>, tokens: &[String], kinds: &[i32]) {
        self.eot = self.eot.or_else(|| end_of_turn(self, tokens, kinds));
        carry_ends(generation, self, tokens);
    }

    /// Those that end generation by their role, each once.
    pub(crate) fn ends(&self) -> Vec<u32> {
        let mut ends: Vec<u32> = Vec::new();
        for id in [self.eos, self.eot, self.eom].into_iter().flatten() {
            if !ends.contains(&id) {
                ends.push(id);
            }
        }
        ends
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

/// llama.cpp looks for an end of turn by a list of texts and, with several in the vocabulary, takes whichever
/// its hash map yields first. So it is always named: the end of sequence if that is in the list, else the
/// first of the list that is there.
fn end_of_turn(special: &SpecialIds, tokens: &[String], kinds: &[i32]) -> Option<u32> {
    let listed = |id: u32| {
        tokens
            .get(id as usize)
            .is_some_and(|token| END_OF_TURN.contains(&token.as_str()))
    };
    special.eos.filter(|id| listed(*id)).or_else(|| {
        END_OF_TURN.iter().find_map(|text| {
            let id = tokens
                .iter()
                .zip(kinds)
                .position(|(token, kind)| token == text && *kind == CONTROL)?;
            u32::try_from(id).ok()
        })
    })
}

/// `eos_token_id` of generation_config.json may be a list, for which GGUF has no key (llama.cpp #9606). Those that the
/// loader does not know by their text take the free places of eot and eom; what does not fit is said.
fn carry_ends(generation: &Map<String, Json>, special: &mut SpecialIds, tokens: &[String]) {
    let ids = match generation.get("eos_token_id") {
        Some(Json::Array(ids)) => ids.iter().filter_map(Json::as_u64).collect(),
        Some(id) => id.as_u64().into_iter().collect::<Vec<_>>(),
        None => return,
    };
    for id in ids {
        let Some(token) = usize::try_from(id).ok().and_then(|id| tokens.get(id)) else {
            tracing::warn!("generation_config.json: eos_token_id {id} is no token");
            continue;
        };
        let Ok(id) = u32::try_from(id) else { continue };
        let known = END_OF_TURN.contains(&token.as_str()) || ENDS_BY_TEXT.contains(&token.as_str());
        if known || [special.eos, special.eot, special.eom].contains(&Some(id)) {
            continue;
        }
        match [&mut special.eos, &mut special.eot, &mut special.eom]
            .into_iter()
            .find(|slot| slot.is_none())
        {
            Some(slot) => *slot = Some(id),
            None => tracing::warn!(
                "generation_config.json ends generation at {token:?} too, and a GGUF file has no key for it"
            ),
        }
    }
}
