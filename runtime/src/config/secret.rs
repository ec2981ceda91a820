//! Secrets: never values, only files, or credentials that systemd hands over.
//!
//! In: the path of the configuration, or `credential:NAME`, which is `$CREDENTIALS_DIRECTORY/NAME` (systemd:
//! LoadCredential=, SetCredentialEncrypted=). Out: what the file holds.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::ConfigError;

/// What a path begins with that names a credential.
pub(super) const CREDENTIAL: &str = "credential:";
/// Largest secret that is read.
const MOST_BYTES: u64 = 64 * 1024;

/// The file that a path of the configuration means.
pub fn file(path: &Path) -> PathBuf {
    resolve(path, std::env::var_os("CREDENTIALS_DIRECTORY"))
}

fn resolve(path: &Path, credentials: Option<OsString>) -> PathBuf {
    match path.to_str().and_then(|path| path.strip_prefix(CREDENTIAL)) {
        // Without the folder the name stands for a file that is not there, and the error names it.
        Some(name) => {
            PathBuf::from(credentials.unwrap_or_else(|| "$CREDENTIALS_DIRECTORY".into())).join(name)
        }
        None => path.to_owned(),
    }
}

/// Reads a secret. One that others may read is pointed out, and read.
///
/// # Errors
/// A file that cannot be read or is too large for a secret.
pub fn read(path: &Path) -> Result<Vec<u8>, ConfigError> {
    let path = file(path);
    let io = |source| ConfigError::Io {
        path: path.clone(),
        source,
    };
    let file = File::open(&path).map_err(io)?;
    let meta = file.metadata().map_err(io)?;
    if meta.mode() & 0o077 != 0 {
        tracing::warn!("{} can be read by other users; hint: chmod 600", path.display());
    }
    let mut bytes = Vec::new();
    file.take(MOST_BYTES + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(io(std::io::Error::other("it is too large for a secret")));
    }
    Ok(bytes)
}

/// Reads a password: the text of a file without the end of its line.
///
/// # Errors
/// Those of [`read`], and bytes that are no text.
pub fn password(path: &Path) -> Result<String, ConfigError> {
    let text = String::from_utf8(read(path)?).map_err(|_| ConfigError::Io {
        path: file(path),
        source: std::io::Error::other("it is not UTF-8"),
    })?;
    Ok(text.trim_end_matches(['\r', '\n']).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_lie_where_systemd_says() {
        let name = Path::new("credential:mqtt-password");
        assert_eq!(
            resolve(name, Some("/run/credentials/pipit".into())),
            Path::new("/run/credentials/pipit/mqtt-password")
        );
        assert!(resolve(name, None).starts_with("$CREDENTIALS_DIRECTORY"));
        assert_eq!(resolve(Path::new("/a/b"), None), Path::new("/a/b"));
    }

    #[test]
    fn passwords() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("password");
        std::fs::write(&path, "s3cret \r\n").unwrap();
        assert_eq!(password(&path).unwrap(), "s3cret ");
        std::fs::write(&path, b"\xff").unwrap();
        assert!(password(&path).unwrap_err().to_string().contains("UTF-8"));
        std::fs::write(&path, vec![b'x'; 70_000]).unwrap();
        assert!(password(&path).unwrap_err().to_string().contains("too large"));
        assert!(password(&folder.path().join("absent")).is_err());
    }
}
