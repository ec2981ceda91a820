//! Whether the numbers of a vocabulary fit together, and the loader of llama.cpp would not abort on them.

use std::collections::HashMap;

use super::{Model, Vocab};

impl Vocab {
    /// What is wrong, if anything is.
    pub(super) fn check(&self) -> Result<(), String> {
        let n = self.tokens.len();
        if self.kinds.len() != n {
            return Err(format!("{n} tokens, but {} token types", self.kinds.len()));
        }
        let mut ids: HashMap<&str, usize> = HashMap::with_capacity(n);
        for (id, token) in self.tokens.iter().enumerate() {
            if token.is_empty() {
                return Err(format!("token {id} is empty"));
            }
            // llama.cpp asserts that there are none, and aborts.
            if let Some(other) = ids.insert(token, id) {
                return Err(format!("tokens {other} and {id} are both {token:?}"));
            }
        }
        match &self.model {
            Model::Bpe { merges, .. } => check_merges(merges, &ids)?,
            Model::SentencePiece { scores, .. } => check_scores(scores, &ids)?,
        }
        for (role, _, id) in self.special.roles() {
            if let Some(id) = id.filter(|id| *id as usize >= n) {
                return Err(format!("the {role} token is {id}, and there are {n} tokens"));
            }
        }
        for (add, role, id) in [
            (self.add_bos, "bos", self.special.bos),
            (self.add_eos, "eos", self.special.eos),
        ] {
            if add && id.is_none() {
                return Err(format!("a {role} token is to be added, and there is none"));
            }
        }
        Ok(())
    }
}

fn check_merges(merges: &[String], ids: &HashMap<&str, usize>) -> Result<(), String> {
    let mut whole = String::new();
    for merge in merges {
        let fits = merge.split_once(' ').is_some_and(|(left, right)| {
            whole.clear();
            whole.push_str(left);
            whole.push_str(right);
            [left, right, &whole].iter().all(|part| ids.contains_key(part))
        });
        if !fits {
            return Err(format!(
                "the merge {merge:?} needs a token that is not in the vocabulary"
            ));
        }
    }
    Ok(())
}

fn check_scores(scores: &[f32], ids: &HashMap<&str, usize>) -> Result<(), String> {
    if scores.len() != ids.len() {
        return Err(format!("{} tokens, but {} scores", ids.len(), scores.len()));
    }
    if let Some(id) = scores.iter().position(|score| !score.is_finite()) {
        return Err(format!("the score of token {id} is {}", scores[id]));
    }
    // llama.cpp looks every byte up that no token covers, and a missing one ends the process.
    let missing = (0..=u8::MAX).find(|byte| !ids.contains_key(byte_token(*byte).as_str()));
    match missing {
        Some(byte) => Err(format!(
            "the token {} is missing: a SentencePiece vocabulary needs all 256 bytes (byte_fallback)",
            byte_token(byte)
        )),
        None => Ok(()),
    }
}

/// SentencePiece's token of a byte.
pub(super) fn byte_token(byte: u8) -> String {
    format!("<0x{byte:02X}>")
}
