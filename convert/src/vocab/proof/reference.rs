//! The checkpoint's own tokenizer, less what is known that llama.cpp does not do.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use tokenizers::normalizers::{Prepend, Replace};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    AddedToken, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer, normalizers,
};

use super::super::{Limit, Model, SPACE, Vocab};
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

/// A tokenizer, and the identifiers that some of its own stand for.
pub(super) type Reference = (Tokenizer, HashMap<u32, u32>);

/// Reads it. For a folder that has only `tokenizer.model` it is what transformers makes of that file.
pub(super) fn load(vocab: &Vocab, dir: &Path) -> Result<Reference, ProofError> {
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
    let mut aliases = HashMap::new();
    for limit in &vocab.limits {
        match limit {
            Limit::Runs => aliases = find_runs(&mut tokenizer).map_err(failed)?,
            limit => leave_out(*limit, vocab, &mut tokenizer).map_err(failed)?,
        }
    }
    Ok((tokenizer, aliases))
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
        // Which ones they are is known when llama.cpp has loaded the vocabulary; and runs have been seen to.
        Limit::Overridden | Limit::Runs => {}
        Limit::Strip => change_added(tokenizer, |token| token.lstrip(false).rstrip(false))?,
        Limit::SingleWord => change_added(tokenizer, |token| token.single_word(false))?,
    }
    Ok(())
}

/// Lets added tokens that spell spaces as U+2581 be found where spaces are. The library has no such token and gives it
/// an identifier of its own.
fn find_runs(tokenizer: &mut Tokenizer) -> tokenizers::Result<HashMap<u32, u32>> {
    let mut aliases = HashMap::new();
    for (id, token) in tokenizer.get_added_tokens_decoder() {
        if token.special || !token.content.contains(SPACE) {
            continue;
        }
        let text = token.content.replace(SPACE, " ");
        tokenizer.add_tokens([AddedToken::from(text.clone(), false).normalized(false)])?;
        aliases.extend(tokenizer.token_to_id(&text).map(|alias| (alias, id)));
    }
    Ok(aliases)
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
