//! The guard: who may come in.
//!
//! A door on this machine alone is still one that a browser here can be led to, by any page: so a request must say that
//! it is meant for this machine (a page's server can give its own name this address, but not take the name back: DNS
//! rebinding), and its body must be called JSON, which a browser does not send elsewhere without asking first (CORS).

use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderMap, HeaderName};
use sha2::{Digest, Sha256};

use crate::config::{ConfigError, Listen};

/// Whom to let in.
#[derive(Debug)]
pub(super) struct Guard {
    /// Whether only requests to this machine's own names are taken.
    local_names: bool,
    /// SHA-256 of the key: to compare hashes tells nothing about the key by the time that it takes.
    key: Option<[u8; 32]>,
}

/// Why somebody is kept out.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Kept {
    /// The name in `Host` is not this machine's.
    Name,
    /// No key, or the wrong one.
    Key,
}

impl Guard {
    /// # Errors
    /// An empty key.
    pub(super) fn new(place: &Listen, key: Option<String>) -> Result<Self, ConfigError> {
        if key.as_ref().is_some_and(String::is_empty) {
            return Err(ConfigError::value(
                "http.key_file",
                "the file is empty; hint: one line, the key",
            ));
        }
        Ok(Self {
            local_names: matches!(place, Listen::Tcp(address) if address.ip().is_loopback()),
            key: key.map(|key| Sha256::digest(key).into()),
        })
    }

    /// Looks at the headers of a request.
    pub(super) fn look(&self, headers: &HeaderMap) -> Result<(), Kept> {
        let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
        if self.local_names && !text(HOST).is_some_and(is_local) {
            return Err(Kept::Name);
        }
        let Some(key) = &self.key else { return Ok(()) };
        let shown = text(AUTHORIZATION).and_then(|value| value.strip_prefix("Bearer "));
        match shown {
            Some(shown) if Sha256::digest(shown.trim())[..] == key[..] => Ok(()),
            _ => Err(Kept::Key),
        }
    }
}

/// Whether `Host` names this machine: `localhost`, an address of the loopback, each with or without a port.
fn is_local(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let name = name.trim_start_matches('[').trim_end_matches(']');
    let is_loopback = |name: &str| {
        name.parse()
            .is_ok_and(|address: std::net::IpAddr| address.is_loopback())
    };
    name.eq_ignore_ascii_case("localhost") || is_loopback(name)
}

/// Whether the body is called JSON.
pub(super) fn says_json(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let kind = kind.and_then(|kind| kind.split(';').next());
    kind.is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(list: &[(HeaderName, &'static str)]) -> HeaderMap {
        let list = list
            .iter()
            .map(|(name, value)| (name.clone(), value.parse().unwrap()));
        list.collect()
    }

    #[test]
    fn only_requests_that_are_meant_for_this_machine() {
        let here = Guard::new(&Listen::Tcp("127.0.0.1:80".parse().unwrap()), None).unwrap();
        for good in [
            "localhost",
            "LOCALHOST:80",
            "127.0.0.1:8080",
            "127.9.9.9",
            "[::1]:80",
            "[::1]",
        ] {
            assert_eq!(here.look(&headers(&[(HOST, good)])), Ok(()), "{good}");
        }
        for bad in ["evil.example", "localhost.evil.example:80", "10.0.0.1", "", "a:b"] {
            assert_eq!(here.look(&headers(&[(HOST, bad)])), Err(Kept::Name), "{bad}");
        }
        assert_eq!(here.look(&headers(&[])), Err(Kept::Name));
        let socket = Guard::new(&Listen::Unix("/x".into()), None).unwrap();
        assert_eq!(socket.look(&headers(&[(HOST, "pipit")])), Ok(()));
    }

    #[test]
    fn the_key_and_nothing_else() {
        let place = Listen::Unix("/x".into());
        assert!(Guard::new(&place, Some(String::new())).is_err());
        let guard = Guard::new(&place, Some("k3y".to_owned())).unwrap();
        assert_eq!(guard.look(&headers(&[(AUTHORIZATION, "Bearer k3y")])), Ok(()));
        for bad in ["Bearer k3", "Bearer ", "k3y", "Basic k3y", "bearer k3y x"] {
            assert_eq!(
                guard.look(&headers(&[(AUTHORIZATION, bad)])),
                Err(Kept::Key),
                "{bad}"
            );
        }
        assert_eq!(guard.look(&headers(&[])), Err(Kept::Key));
    }

    #[test]
    fn json_is_called_json() {
        for (kind, good) in [
            ("application/json", true),
            ("Application/JSON; charset=utf-8", true),
            ("text/plain", false),
            ("application/jsonp", false),
        ] {
            assert_eq!(says_json(&headers(&[(CONTENT_TYPE, kind)])), good, "{kind}");
        }
        assert!(!says_json(&headers(&[])));
    }
}
