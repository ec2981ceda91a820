//! The constraint: an answer that must obey a JSON schema.
//!
//! In: a schema, and every token of the answer. Out: which tokens may come next, and those that must come (they need
//! no sampling, and all of them go through the model in one step). The grammar is the crate llguidance's, which
//! computes a mask over the vocabulary for each token. The JSON is compact, `{"a":1,"b":[2,3]}`: whitespace would
//! cost tokens and energy, and no program that reads JSON needs it.
//!
//! An answer that reaches `max_tokens` in the middle is closed by the grammar alone ([`Constraint::close`]): what is
//! sent is always valid JSON.

use std::sync::Arc;

use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::token::LlamaToken;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie, TokenizerEnv};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

/// Bytes that closing an answer may add.
const MOST_CLOSING: usize = 4096;
/// What closes a value soonest, tried in this order; then digits and whatever else the grammar allows.
const CLOSERS: &[u8] = b"\"}]0tfn{[";

/// Compiles schemas for one model. Building it walks the whole vocabulary (about 0.1 s for 50,000 tokens), so it is
/// made when the first schema comes.
pub struct Compiler {
    factory: ParserFactory,
}

impl std::fmt::Debug for Compiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compiler").finish_non_exhaustive()
    }
}

impl Compiler {
    /// The compiler for a model's vocabulary.
    ///
    /// # Errors
    /// What llguidance says.
    pub fn new(model: &'static LlamaModel) -> Result<Self, String> {
        let tokens: TokEnv = Arc::new(Vocabulary::new(model));
        // Strings are the commonest lexeme: a precomputed slice of the vocabulary for them.
        let slices = llguidance::earley::SlicedBiasComputer::json_slices();
        let capabilities = InferenceCapabilities {
            ff_tokens: true,
            ..InferenceCapabilities::default()
        };
        let mut factory =
            ParserFactory::new(&tokens, capabilities, &slices).map_err(|error| error.to_string())?;
        factory.quiet();
        let limits = factory.limits_mut();
        // A device has no gigabytes for one request's grammar, and no seconds for its compilation.
        limits.max_grammar_size = 50_000;
        limits.max_lexer_states = 25_000;
        limits.verbose_errors = false;
        Ok(Self { factory })
    }

    /// A constraint at the beginning of an answer.
    ///
    /// # Errors
    /// A schema that is wrong, not supported or too large, in llguidance's words.
    pub fn compile(&self, schema: &Value) -> Result<Constraint, String> {
        let mut schema = schema.clone();
        if let Value::Object(fields) = &mut schema {
            fields.insert("x-guidance".to_owned(), json!({ "whitespace_flexible": false }));
        }
        let grammar = TopLevelGrammar::from_json_schema(schema);
        let parser = self
            .factory
            .create_parser(grammar)
            .map_err(|error| error.to_string())?;
        let matcher = Matcher::new(Ok(parser));
        match matcher.get_error() {
            Some(error) => Err(error),
            None => Ok(Constraint { matcher }),
        }
    }
}

/// Where an answer stands in its schema.
pub struct Constraint {
    matcher: Matcher,
}

impl std::fmt::Debug for Constraint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Constraint").finish_non_exhaustive()
    }
}

impl Constraint {
    /// The tokens that may come next; those that end the answer are among them where it may end.
    ///
    /// # Errors
    /// When the grammar is stuck or too costly.
    pub fn allowed(&mut self) -> Result<SimpleVob, String> {
        self.matcher
            .compute_mask_or_eos()
            .map_err(|error| error.to_string())
    }

    /// Takes a token that [`Self::allowed`] has.
    ///
    /// # Errors
    /// A token that the schema forbids.
    pub fn accept(&mut self, token: LlamaToken) -> Result<(), String> {
        self.matcher
            .consume_token(token.0.cast_unsigned())
            .map_err(|error| error.to_string())
    }

    /// Tokens that the schema forces from here on, already taken; often the name of the next field.
    pub fn forced(&mut self) -> Vec<LlamaToken> {
        let tokens = self.matcher.consume_ff_tokens();
        tokens
            .into_iter()
            .map(|token| LlamaToken(token.cast_signed()))
            .collect()
    }

    /// Whether nothing can follow.
    pub fn is_complete(&self) -> bool {
        self.matcher.is_stopped() && !self.matcher.is_error()
    }

    /// Bytes that make a cut answer valid: the shortest values that the schema allows, as far as a walk that never
    /// looks back can tell. They are the grammar's, not the model's.
    ///
    /// # Errors
    /// When the schema wants more than 4096 bytes, a long pattern for example.
    pub fn close(&mut self) -> Result<Vec<u8>, String> {
        let fail = |error: anyhow::Error| error.to_string();
        let env = self.matcher.tok_env().map_err(fail)?;
        let trie = env.tok_trie();
        let byte_token = |byte: u8| trie.token_id_at_bytes(&[byte]);
        let mut closing = Vec::new();
        while !self.matcher.is_stopped() && !self.matcher.is_accepting().map_err(fail)? {
            if closing.len() >= MOST_CLOSING {
                return Err(format!("the schema wants more than {MOST_CLOSING} bytes more"));
            }
            let mask = self.matcher.compute_mask().map_err(fail)?;
            let single = CLOSERS
                .iter()
                .chain(b"123456789-. :,")
                .copied()
                .chain(0x20..=0x7e)
                .chain(0x80..=0xf4)
                .filter_map(byte_token)
                .find(|&token| mask.is_allowed(token));
            let token = match single {
                Some(token) => token,
                // A vocabulary without a token for this byte: the first that is allowed.
                None => mask
                    .first_bit_set()
                    .and_then(|token| u32::try_from(token).ok())
                    .ok_or("the schema allows nothing more")?,
            };
            closing.extend_from_slice(trie.token(token));
            self.matcher.consume_token(token).map_err(fail)?;
        }
        Ok(closing)
    }
}

/// llama.cpp's vocabulary, as llguidance wants it.
struct Vocabulary {
    model: &'static LlamaModel,
    trie: TokTrie,
    /// Whether llama.cpp splits a text's bytes as they are, without a space of its own in front.
    canonical: bool,
}

impl Vocabulary {
    fn new(model: &'static LlamaModel) -> Self {
        let vocab = model.vocab();
        let end = [vocab.eot(), vocab.eos()]
            .into_iter()
            .find(|token| token.0 >= 0)
            .map_or(0, |token| token.0.cast_unsigned());
        let mut ends = vec![end];
        let mut words = Vec::new();
        for token in vocab.tokens() {
            if vocab.is_eog(token) && token.0.cast_unsigned() != end {
                ends.push(token.0.cast_unsigned());
            }
            let bytes = vocab.token_to_piece(token, false, None);
            words.push(if bytes.is_empty() {
                // A control token: marked, so that no text can mean it.
                let text = vocab.token_to_piece(token, true, None);
                if text.is_empty() {
                    text
                } else {
                    [&[TokTrie::SPECIAL_TOKEN_MARKER], text.as_slice()].concat()
                }
            } else {
                bytes
            });
        }
        let info = TokRxInfo::new(u32::try_from(words.len()).unwrap_or(u32::MAX), end);
        let trie = TokTrie::from(&info, &words).with_eos_tokens(&ends);
        let canonical = [r#"{"a":"#, "true", r#"","name":""#].iter().all(|text| {
            let pieces = vocab.tokenize(text.as_bytes(), false, false);
            let bytes: Vec<u8> = pieces
                .into_iter()
                .flat_map(|token| vocab.token_to_piece(token, false, None))
                .collect();
            bytes == text.as_bytes()
        });
        Self {
            model,
            trie,
            canonical,
        }
    }
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<u32> {
        if self.canonical && std::str::from_utf8(bytes).is_ok() {
            let tokens = self.model.vocab().tokenize(bytes, false, false);
            tokens.into_iter().map(|token| token.0.cast_unsigned()).collect()
        } else {
            self.trie.greedy_tokenize(bytes)
        }
    }

    fn tokenize_is_canonical(&self) -> bool {
        self.canonical
    }
}
