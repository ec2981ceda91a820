//! The broker's address: a URL becomes a host and a port, or a place to listen.

use std::net::SocketAddr;

use super::{ConfigError, EMBEDDED};

/// What `broker.url` means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// Another program.
    Remote {
        /// Name or address.
        host: String,
        /// TCP port.
        port: u16,
        /// Encrypted.
        tls: bool,
    },
    /// This program.
    Embedded(SocketAddr),
}

impl Address {
    /// Reads a URL.
    ///
    /// # Errors
    /// [`ConfigError::Value`]
    pub fn parse(url: &str) -> Result<Self, ConfigError> {
        let fail = |why: &str| {
            ConfigError::value(
                "broker.url",
                format!(
                    "`{url}` {why}; hint: mqtt://HOST[:PORT], mqtts://HOST[:PORT] or embedded[://ADDR:PORT]"
                ),
            )
        };
        if url == "embedded" {
            return Self::parse(EMBEDDED);
        }
        let Some((scheme, rest)) = url.split_once("://") else {
            return Err(fail("is no broker's address"));
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (tls, default_port) = match scheme {
            "mqtt" => (false, 1883),
            "mqtts" => (true, 8883),
            "embedded" if cfg!(feature = "embedded-broker") => {
                let address = rest.parse().map_err(|_| fail("needs an address and a port"))?;
                return Ok(Self::Embedded(address));
            }
            "embedded" => return Err(fail("was left out of this build (cargo feature embedded-broker)")),
            _ => return Err(fail("has an unknown scheme")),
        };
        if rest.contains('@') {
            return Err(fail(
                "holds a password; hint: [broker] username and password_file",
            ));
        }
        let (host, port) = match rest.rsplit_once(':') {
            // [::1]:1883, and ::1 without a port.
            Some((host, port)) if !host.contains(':') || host.ends_with(']') => (
                host,
                port.parse()
                    .ok()
                    .filter(|&port| port > 0)
                    .ok_or_else(|| fail("has no such port"))?,
            ),
            _ => (rest, default_port),
        };
        let host = host.trim_matches(['[', ']']);
        if host.is_empty() || host.contains(['/', '?', '#', ' ']) {
            return Err(fail("has no host"));
        }
        Ok(Self::Remote {
            host: host.to_owned(),
            port,
            tls,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let remote = |host: &str, port, tls| Address::Remote {
            host: host.to_owned(),
            port,
            tls,
        };
        assert_eq!(Address::parse("mqtt://h").unwrap(), remote("h", 1883, false));
        assert_eq!(Address::parse("mqtts://h:1/").unwrap(), remote("h", 1, true));
        assert_eq!(Address::parse("mqtt://[::1]:7").unwrap(), remote("::1", 7, false));
        assert_eq!(Address::parse("mqtt://::1").unwrap(), remote("::1", 1883, false));
        #[cfg(feature = "embedded-broker")]
        assert_eq!(
            Address::parse("embedded").unwrap(),
            Address::Embedded("127.0.0.1:1883".parse().unwrap())
        );
        for bad in [
            "h",
            "mqtt://",
            "mqtt://h:0",
            "mqtt://h:x",
            "mqtt://u:p@h",
            "embedded://x",
            "mqtt://a/b",
        ] {
            assert!(Address::parse(bad).is_err(), "{bad}");
        }
    }
}
