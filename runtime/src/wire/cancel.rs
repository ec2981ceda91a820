//! A cancel: a client wants no answer to a request any more.

use serde::{Deserialize, Serialize};

use super::topics::valid_id;

/// The cancel topic. The request ends with the error `cancelled`, unless it was answered before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Cancel {
    /// The request's id.
    #[cfg_attr(test, schemars(regex(pattern = r"^[A-Za-z0-9_.-]{1,64}$")))]
    pub id: String,
}

impl Cancel {
    /// Reads `{"id": …}` or the bare id; `None` for anything else. Other fields are passed over: there is nobody to
    /// tell about them.
    pub fn parse(payload: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(payload).ok()?.trim();
        let cancel = if text.starts_with('{') {
            serde_json::from_str(text).ok()?
        } else {
            Self { id: text.to_owned() }
        };
        valid_id(&cancel.id).then_some(cancel)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_or_a_bare_id() {
        let cancel = Some(Cancel { id: "a-1".to_owned() });
        assert_eq!(Cancel::parse(br#"{"id":"a-1"}"#), cancel);
        assert_eq!(Cancel::parse(b" a-1\n"), cancel);
        for bad in [
            &b""[..],
            b"{}",
            b"{\"id\":7}",
            b"{\"id\":\"a/b\"}",
            b"a b",
            b"\xff",
            b"[]",
        ] {
            assert_eq!(Cancel::parse(bad), None, "{bad:?}");
        }
    }
}
