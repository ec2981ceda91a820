//! Ids of requests that bring none, and what tells two messages apart.

use sha2::{Digest, Sha256};

use super::Envelope;
use crate::wire::topics::valid_id;

pub(crate) fn generated_id() -> String {
    uuid::Uuid::now_v7().to_string()
}

/// An id from Correlation Data: the data itself where it is an id, its hexadecimal digits where they fit, else a
/// hash of it. The same data always gives the same id.
pub(super) fn correlation_id(data: &[u8]) -> String {
    match std::str::from_utf8(data) {
        Ok(text) if valid_id(text) => text.to_owned(),
        _ if (1..=31).contains(&data.len()) => format!("x-{}", hex(data)),
        _ => format!("h-{}", hex(&Sha256::digest(data)[..16])),
    }
}

/// What a message without an id is recognised by when the broker sends it again.
pub(super) fn fingerprint(envelope: &Envelope<'_>) -> String {
    let mut hash = Sha256::new();
    let topic = envelope.response_topic.unwrap_or_default();
    hash.update((topic.len() as u64).to_le_bytes());
    hash.update(topic.as_bytes());
    hash.update(envelope.payload);
    hex(&hash.finalize()[..16])
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut out, byte| {
            for nibble in [byte >> 4, byte & 15] {
                out.push(char::from_digit(u32::from(nibble), 16).unwrap_or('0'));
            }
            out
        })
}
