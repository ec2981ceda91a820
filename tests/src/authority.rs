//! Certificates of the test's own, made by openssl: an authority, a server on this machine, a client.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use tempfile::TempDir;

use crate::process;

const SOON: Duration = Duration::from_secs(30);

/// An authority and whom it has certified.
#[derive(Debug)]
pub struct Authority {
    folder: TempDir,
}

impl Authority {
    /// An authority with a server for 127.0.0.1 and localhost and a client called `client`.
    ///
    /// # Errors
    /// When openssl is not installed.
    pub fn new(client: &str) -> Result<Self> {
        let authority = Self {
            folder: tempfile::tempdir()?,
        };
        let (key, pem) = (authority.file("ca.key"), authority.file("ca.pem"));
        let mut words = NEW_KEY.to_vec();
        let (key, pem) = (key.to_string_lossy(), pem.to_string_lossy());
        words.extend(["-x509", "-days", "2", "-subj", "/CN=authority of a test"]);
        words.extend([
            "-addext",
            "basicConstraints=critical,CA:TRUE",
            "-keyout",
            &*key,
            "-out",
            &*pem,
        ]);
        process::run("openssl", words, SOON)?.success()?;
        authority.certify("server", "localhost", "subjectAltName=IP:127.0.0.1,DNS:localhost")?;
        authority.certify("client", client, "extendedKeyUsage=clientAuth")?;
        Ok(authority)
    }

    /// `ca.pem`, `server.pem`, `server.key`, `client.pem`, `client.key`
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn certify(&self, file: &str, name: &str, extension: &str) -> Result<()> {
        let path = |suffix: &str| {
            self.file(&format!("{file}.{suffix}"))
                .to_string_lossy()
                .into_owned()
        };
        let (key, request, pem) = (path("key"), path("csr"), path("pem"));
        let subject = format!("/CN={name}");
        let mut words = NEW_KEY.to_vec();
        words.extend([
            "-subj", &subject, "-addext", extension, "-keyout", &key, "-out", &request,
        ]);
        process::run("openssl", words, SOON)?.success()?;
        let own = |name: &str| self.file(name).to_string_lossy().into_owned();
        let (ca, ca_key) = (own("ca.pem"), own("ca.key"));
        let words = [
            "x509",
            "-req",
            "-in",
            &request,
            "-CA",
            &ca,
            "-CAkey",
            &ca_key,
            "-CAcreateserial",
            "-days",
            "2",
            "-copy_extensions",
            "copy",
            "-out",
            &pem,
        ];
        process::run("openssl", words, SOON)?.success()?;
        Ok(())
    }

    /// Lines of mosquitto.conf for its listener.
    pub fn listener(&self, more: &str) -> String {
        let path = |name: &str| -> String { Path::display(&self.file(name)).to_string() };
        format!(
            "cafile {}\ncertfile {}\nkeyfile {}\n{more}",
            path("ca.pem"),
            path("server.pem"),
            path("server.key")
        )
    }
}

const NEW_KEY: [&str; 7] = [
    "req",
    "-newkey",
    "ec",
    "-pkeyopt",
    "ec_paramgen_curve:prime256v1",
    "-nodes",
    "-batch",
];
