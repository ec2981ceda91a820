//! Where the HTTP door is: an address of this machine, or a socket in the file system.

use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use super::{ConfigError, HttpSection};

/// What `http.listen` means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// A TCP port.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix(PathBuf),
}

impl Listen {
    /// Reads `ADDRESS:PORT` or `unix:/FILE`, and looks whether the section allows it.
    ///
    /// # Errors
    /// [`ConfigError::Value`]
    pub fn parse(text: &str, section: &HttpSection) -> Result<Self, ConfigError> {
        let fail = |why: &str| ConfigError::value("http.listen", format!("`{text}` {why}"));
        if !cfg!(feature = "http") {
            return Err(fail("was left out of this build; hint: cargo feature http"));
        }
        if let Some(path) = text.strip_prefix("unix:") {
            let path = PathBuf::from(path);
            return match path.is_absolute() {
                true => Ok(Self::Unix(path)),
                false => Err(fail("names no file; hint: unix:/run/pipit/http.sock")),
            };
        }
        let address: SocketAddr = text.parse().map_err(|_| {
            fail("is no address; hint: 127.0.0.1:8080, [::1]:8080 or unix:/run/pipit/http.sock")
        })?;
        if !address.ip().is_loopback() && !section.beyond_localhost {
            return Err(fail(
                "can be reached from other machines, and nothing there is encrypted; hint: 127.0.0.1, or [http] beyond_localhost",
            ));
        }
        if !address.ip().is_loopback() && section.key_file.is_none() {
            return Err(fail(
                "can be reached from other machines, and everyone may ask; hint: [http] key_file",
            ));
        }
        Ok(Self::Tcp(address))
    }

    /// Whether a socket's file lies there that nobody listens on any more: what the daemon replaces.
    #[must_use]
    pub fn is_abandoned_socket(path: &Path) -> bool {
        let is_socket = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
        is_socket && UnixStream::connect(path).is_err()
    }
}

#[cfg(all(test, feature = "http"))]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_unless_told_otherwise() {
        let closed = HttpSection::default();
        let open = HttpSection {
            beyond_localhost: true,
            ..HttpSection::default()
        };
        let keyed = HttpSection {
            key_file: Some("/k".into()),
            ..open.clone()
        };
        for good in ["127.0.0.1:8080", "127.1.2.3:0", "[::1]:8080"] {
            assert_eq!(
                Listen::parse(good, &closed).unwrap(),
                Listen::Tcp(good.parse().unwrap())
            );
        }
        assert_eq!(
            Listen::parse("unix:/run/x", &closed).unwrap(),
            Listen::Unix("/run/x".into())
        );
        for bad in [
            "",
            "8080",
            "localhost:8080",
            "unix:",
            "unix:x",
            "http://127.0.0.1:1",
            "0.0.0.0:8080",
            "[::]:8080",
        ] {
            assert!(Listen::parse(bad, &closed).is_err(), "{bad}");
        }
        let error = Listen::parse("192.168.1.2:80", &open).unwrap_err().to_string();
        assert!(error.contains("key_file"), "{error}");
        assert!(Listen::parse("0.0.0.0:8080", &keyed).is_ok());
    }
}
