//! The state folder: may it be written, is there room, does a daemon use it already?

use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, FlockOperation, access, flock, statvfs};

use super::Finding;
use super::State as Judgement;
use crate::config::{Config, ConfigError};
use crate::plan::mebibytes;

const WHAT: &str = "state folder";

/// The folder, and whether a daemon holds its lock.
#[derive(Debug)]
pub struct State {
    folder: Result<PathBuf, ConfigError>,
    in_use: bool,
}

impl State {
    /// Finds the folder of a configuration.
    pub fn of(config: &Config) -> Self {
        let folder = config.state_dir();
        let in_use = folder.as_ref().is_ok_and(|folder| locked(&folder.join("lock")));
        Self { folder, in_use }
    }

    /// Whether a daemon is running with it.
    pub fn in_use(&self) -> bool {
        self.in_use
    }

    /// Whether it can be written, and the room on its disk.
    pub fn findings(&self, config: &Config) -> Vec<Finding> {
        let folder = match &self.folder {
            Ok(folder) => folder,
            Err(error) => return vec![Finding::of_error(WHAT, error)],
        };
        // The daemon makes the folder: then its nearest parent counts.
        let exists = folder.ancestors().find(|folder| folder.exists());
        let there = exists.unwrap_or_else(|| Path::new("/"));
        let name = folder.display();
        let writable = if !there.is_dir() {
            Err(format!("{} is a file", there.display()))
        } else {
            access(there, Access::WRITE_OK | Access::EXEC_OK)
                .map_err(|error| format!("{}: {error}", there.display()))
        };
        let first = match (writable, self.in_use) {
            (Err(reason), _) => Finding::new(WHAT, Judgement::Fail, reason)
                .hint("--state-dir, or state_dir, names a folder that this user may write"),
            (Ok(()), true) => Finding::new(WHAT, Judgement::Info, format!("{name}; a daemon uses it")),
            (Ok(()), false) => Finding::new(WHAT, Judgement::Ok, name.to_string()),
        };
        vec![first, room(there, config)]
    }
}

fn room(folder: &Path, config: &Config) -> Finding {
    const WHAT: &str = "disk";
    match statvfs(folder) {
        Ok(disk) => judge_room(disk.f_bavail.saturating_mul(disk.f_frsize), config),
        Err(error) => Finding::new(WHAT, Judgement::Fail, format!("{}: {error}", folder.display())),
    }
}

fn judge_room(free: u64, config: &Config) -> Finding {
    const WHAT: &str = "disk";
    // A journal that is written anew is there twice for a moment, and holds what was delivered, too.
    let journal = (config.journal.bytes as u64).saturating_mul(3);
    let all = journal.saturating_add(config.prefix.disk_bytes);
    let says = format!("{} free", mebibytes(free));
    if free < journal {
        Finding::new(WHAT, Judgement::Fail, says).hint(format!(
            "the journal needs up to {}: without it every request is refused; [journal] bytes sets it",
            mebibytes(journal)
        ))
    } else if free < all {
        Finding::new(WHAT, Judgement::Warn, says).hint(format!(
            "journal and kept beginnings of prompts take up to {}; [prefix] disk_bytes sets the larger part",
            mebibytes(all)
        ))
    } else {
        Finding::new(WHAT, Judgement::Ok, says)
    }
}

/// Whether somebody holds a lock on a file; a file that is not there has none.
fn locked(path: &Path) -> bool {
    let Ok(file) = fs::File::open(path) else {
        return false;
    };
    flock(&file, FlockOperation::NonBlockingLockShared) == Err(rustix::io::Errno::WOULDBLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(folder: &Path) -> Config {
        Config {
            state_dir: Some(folder.to_owned()),
            ..Config::default()
        }
    }

    #[test]
    fn a_folder_that_can_be_made_and_one_that_cannot() {
        let folder = tempfile::tempdir().unwrap();
        let fresh = config(&folder.path().join("a/b"));
        let state = State::of(&fresh);
        assert_eq!(state.findings(&fresh)[0].state, Judgement::Ok);
        assert!(!state.in_use());
        assert!(!folder.path().join("a").exists(), "nothing is changed");
        fs::write(folder.path().join("file"), "").unwrap();
        let blocked = config(&folder.path().join("file/state"));
        assert_eq!(State::of(&blocked).findings(&blocked)[0].state, Judgement::Fail);
    }

    #[test]
    fn a_lock_that_is_held() {
        let folder = tempfile::tempdir().unwrap();
        let file = fs::File::create(folder.path().join("lock")).unwrap();
        let config = config(folder.path());
        assert!(!State::of(&config).in_use());
        flock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
        let state = State::of(&config);
        assert!(state.in_use());
        assert_eq!(state.findings(&config)[0].state, Judgement::Info);
    }

    #[test]
    fn room_for_the_journal() {
        let config = Config::default();
        assert_eq!(judge_room(1 << 40, &config).state, Judgement::Ok);
        assert_eq!(judge_room(100 << 20, &config).state, Judgement::Warn);
        assert_eq!(judge_room(1 << 20, &config).state, Judgement::Fail);
    }
}
