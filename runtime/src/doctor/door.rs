//! The HTTP door: can it be where the configuration wants it?

use std::net::TcpListener;
use std::path::Path;

use rustix::fs::{Access, access};

use super::{Finding, State};
use crate::config::{Config, Listen, secret};

const WHAT: &str = "http";

/// Looks at the place, unless the daemon has it, and at the key; nothing where there is no door.
pub fn finding(config: &Config, daemon_runs: bool) -> Option<Finding> {
    let listen = config.http.listen.as_deref()?;
    let place = match Listen::parse(listen, &config.http) {
        Ok(place) => place,
        Err(error) => return Some(Finding::of_error(WHAT, &error)),
    };
    if let Some(Err(error)) = config.http.key_file.as_deref().map(secret::password) {
        return Some(Finding::of_error(WHAT, &error));
    }
    if daemon_runs {
        return Some(Finding::new(WHAT, State::Ok, format!("{listen} is the daemon's")));
    }
    let free = match &place {
        Listen::Tcp(address) => TcpListener::bind(address).map(drop),
        Listen::Unix(path) => place_of_socket(path),
    };
    Some(match free {
        Ok(()) => Finding::new(WHAT, State::Ok, format!("{listen} is free")),
        Err(error) => Finding::new(WHAT, State::Fail, format!("{listen}: {error}"))
            .hint("[http] listen names another address, or another file of a folder that is there"),
    })
}

/// Whether a socket can be made, as the daemon makes it.
fn place_of_socket(path: &Path) -> std::io::Result<()> {
    if path.symlink_metadata().is_ok() && !Listen::is_abandoned_socket(path) {
        return Err(std::io::ErrorKind::AddrInUse.into());
    }
    let folder = path.parent().unwrap_or(Path::new("/"));
    Ok(access(folder, Access::WRITE_OK | Access::EXEC_OK)?)
}
