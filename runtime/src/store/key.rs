//! Trusted keys: whose signature makes a manifest good.
//!
//! In: minisign public keys, of the configuration and of the build (`PIPIT_TRUSTED_KEYS`, separated by blanks, when
//! cargo builds it). Out: yes or no to a signature. Source: <https://jedisct1.github.io/minisign/>, through the crate
//! minisign-verify, which also checks the trusted comment.

use minisign_verify::{PublicKey, Signature};

use super::StoreError;

/// Keys that came with the program.
const OF_THE_BUILD: Option<&str> = option_env!("PIPIT_TRUSTED_KEYS");
/// Set at build time to take unsigned models, for a device that is its own maker's.
const UNSIGNED_BUILD: Option<&str> = option_env!("PIPIT_ALLOW_UNSIGNED");

/// The keys.
#[derive(Clone, Debug)]
pub struct Keys {
    keys: Vec<PublicKey>,
    allow_unsigned: bool,
}

impl Keys {
    /// Those of a configuration and of the build.
    ///
    /// # Errors
    /// The key that is none.
    pub fn new(trusted: &[String], allow_unsigned: bool) -> Result<Self, String> {
        let built_in = OF_THE_BUILD.unwrap_or_default().split_whitespace();
        let keys = trusted.iter().map(String::as_str).chain(built_in);
        Ok(Self {
            keys: keys.map(parse).collect::<Result<_, _>>()?,
            allow_unsigned: allow_unsigned || UNSIGNED_BUILD.is_some(),
        })
    }

    /// Whether `signature` is a trusted key's over `manifest`. Without one, whether that is allowed.
    ///
    /// # Errors
    /// [`StoreError::Unsigned`], [`StoreError::NoKeys`], [`StoreError::Signature`]
    pub fn verify(&self, manifest: &[u8], signature: Option<&[u8]>, place: &str) -> Result<(), StoreError> {
        if self.keys.is_empty() && self.allow_unsigned {
            return Ok(());
        }
        let Some(signature) = signature else {
            return match self.allow_unsigned {
                true => Ok(()),
                false => Err(StoreError::Unsigned {
                    place: place.to_owned(),
                }),
            };
        };
        if self.keys.is_empty() {
            return Err(StoreError::NoKeys);
        }
        let fail = |message: String, hint| StoreError::Signature {
            place: place.to_owned(),
            message,
            hint,
        };
        let again = "sign it again: `minisign -Sm manifest.json`";
        let text = std::str::from_utf8(signature).map_err(|error| fail(error.to_string(), again))?;
        let signature = Signature::decode(text).map_err(|error| fail(error.to_string(), again))?;
        // Only signatures of the hash of the file: minisign's own since version 0.8.
        let verified = |key: &PublicKey| key.verify(manifest, &signature, false);
        let mut last = None;
        for key in &self.keys {
            match verified(key) {
                Ok(()) => return Ok(()),
                Err(error) => last = Some(error),
            }
        }
        Err(fail(
            last.map_or_else(String::new, |error| error.to_string()),
            "it was changed after it was signed, or signed with a key that [install] trusted_keys does not have",
        ))
    }
}

/// A public key: the second line of minisign.pub.
fn parse(key: &str) -> Result<PublicKey, String> {
    PublicKey::from_base64(key.trim())
        .map_err(|_| format!("`{key}` is no minisign public key; hint: the second line of minisign.pub, RW…"))
}
