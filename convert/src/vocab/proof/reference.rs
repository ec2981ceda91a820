//! The checkpoint's own tokenizer, less what is known that llama.cpp does not do.

use std::path::{Path, PathBuf};

use tokenizers::normalizers::{Prepend, Replace};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    AddedToken, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer, normalizers,
};

use super::super::{Limit, Model, Vocab};
use super::ProofError;

/// The file that it is read from.
pub(super) fn path(dir: &Path) -> PathBuf {
    let json = dir.join("tokenizer.json");
    if json.is_file() {
        json
    } else {
        dir.join("tokenizer.model")
    }
}

/// Reads it. For a folder that has only `tokenizer.model` it is what transformers makes of that file.
pub(super) fn load(vocab: &Vocab, dir: &Path) -> Result<Tokenizer, ProofError> {
    let path = path(dir);
    let json = path.extension().is_some_and(|extension| extension == "json");
    let read = if json {
        Tokenizer::from_file(&path)
    } else {
        vocab.tokenizer_json().to_string().parse()
    };
    let failed = |why: tokenizers::Error| ProofError::Reference {
        path: path.clone(),
        why: why.to_string(),
    };
    let mut tokenizer = read.map_err(failed)?;
    for limit in &vocab.limits {
        leave_out(*limit, vocab, &mut tokenizer).map_err(failed)?;
    }
    Ok(tokenizer)
}

fn leave_out(limit: Limit, vocab: &Vocab, tokenizer: &mut Tokenizer) -> tokenizers::Result<()> {
    match limit {
        Limit::Nfc => {
            tokenizer.with_normalizer(None::<NormalizerWrapper>)?;
        }
        Limit::SpaceOnce => {
            let spaces: Vec<NormalizerWrapper> = vec![
                Prepend::new("\u{2581}".to_owned()).into(),
                Replace::new(" ", "\u{2581}")?.into(),
            ];
            tokenizer.with_normalizer(Some(normalizers::Sequence::new(spaces)))?;
            tokenizer.with_pre_tokenizer(None::<PreTokenizerWrapper>);
        }
        Limit::Case => {
            if let Model::Bpe { pre, .. } = &vocab.model
                && let Some(regex) = pre.runtime()
            {
                let cut = Split::new(
                    SplitPattern::Regex(regex.to_owned()),
                    SplitDelimiterBehavior::Isolated,
                    false,
                )?;
                let steps: Vec<PreTokenizerWrapper> =
                    vec![cut.into(), ByteLevel::new(false, true, false).into()];
                tokenizer.with_pre_tokenizer(Some(Sequence::new(steps)));
            }
        }
        // Which ones they are is known when llama.cpp has loaded the vocabulary.
        Limit::Overridden => {}
        Limit::Strip => change_added(tokenizer, |token| token.lstrip(false).rstrip(false))?,
        Limit::SingleWord => change_added(tokenizer, |token| token.single_word(false))?,
    }
    Ok(())
}

fn change_added(
    tokenizer: &mut Tokenizer,
    change: impl Fn(AddedToken) -> AddedToken,
) -> tokenizers::Result<()> {
    let added: Vec<AddedToken> = tokenizer.get_added_tokens_decoder().into_values().collect();
    let (special, plain): (Vec<_>, Vec<_>) = added.into_iter().map(change).partition(|token| token.special);
    tokenizer.add_special_tokens(special)?;
    tokenizer.add_tokens(plain)?;
    Ok(())
}
