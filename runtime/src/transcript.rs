//! The transcript: what was asked and answered, in words, for whom the owner has told the device to keep it.
//!
//! Off by default: the log has ids, counts and times only. In: requests and answers. Out: JSON lines in files of one hour
//! each, `content/HOUR.jsonl` of the state folder (the hour since 1970), which are removed when they are older than
//! `[content] hours`, also those of before when it was switched off. Source of the duty: GDPR article 5(1)(e), storage
//! limitation.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::wire::Message;

const HOUR_MS: u64 = 3_600_000;
const MINUTE_MS: u64 = 60_000;

/// One request with its answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// Unix time, milliseconds.
    pub at: u64,
    /// The request's id.
    pub id: String,
    /// Who asked: the name of the client as the queue has it.
    pub client: String,
    /// The conversation.
    pub messages: Vec<Message>,
    /// The answer's payload.
    pub answer: String,
}

/// The files.
#[derive(Debug)]
pub struct Transcript {
    folder: PathBuf,
    hours: u64,
    /// Minute of the last look for files that are too old.
    looked: u64,
}

impl Transcript {
    /// In a state folder; 0 hours keep nothing.
    pub fn of(state: &Path, hours: u64) -> Self {
        Self {
            folder: state.join("content"),
            hours,
            looked: 0,
        }
    }

    /// Whether anything is to be kept.
    pub fn is_on(&self) -> bool {
        self.hours > 0
    }

    /// Adds a line.
    ///
    /// # Errors
    /// I/O errors.
    pub fn write(&self, line: &Line) -> std::io::Result<()> {
        fs::create_dir_all(&self.folder)?;
        let path = self.folder.join(format!("{}.jsonl", line.at / HOUR_MS));
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)?
            .write_all(&text)
    }

    /// Removes what is older than its lifetime, once a minute.
    pub fn expire(&mut self, now_ms: u64) {
        if std::mem::replace(&mut self.looked, now_ms / MINUTE_MS) == now_ms / MINUTE_MS {
            return;
        }
        let oldest = (now_ms / HOUR_MS).saturating_sub(self.hours);
        for (hour, path) in self.files() {
            if hour < oldest || self.hours == 0 {
                let _ = fs::remove_file(path);
            }
        }
    }

    /// Removes every line that `wanted` names; returns how many.
    ///
    /// # Errors
    /// I/O errors.
    pub fn erase(&self, wanted: impl Fn(&Line) -> bool) -> std::io::Result<u64> {
        let mut erased = 0;
        for (_, path) in self.files() {
            let text = fs::read_to_string(&path)?;
            let kept: Vec<&str> = text
                .lines()
                // A line that was cut by a crash goes, too: nobody can say whose it is.
                .filter(|line| serde_json::from_str(line).is_ok_and(|line| !wanted(&line)))
                .collect();
            let lost = (text.lines().count() - kept.len()) as u64;
            if lost == 0 {
                continue;
            }
            erased += lost;
            let beside = path.with_extension("new");
            let mut file = fs::File::create(&beside)?;
            kept.iter().try_for_each(|line| writeln!(file, "{line}"))?;
            file.sync_all()?;
            fs::rename(&beside, &path)?;
        }
        Ok(erased)
    }

    fn files(&self) -> Vec<(u64, PathBuf)> {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| {
                let path = entry.path();
                let hour = path.file_stem()?.to_str()?.parse().ok()?;
                Some((hour, path))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(hour: u64, id: &str, client: &str) -> Line {
        Line {
            at: hour * HOUR_MS + 5,
            id: id.to_owned(),
            client: client.to_owned(),
            messages: Vec::new(),
            answer: "on".to_owned(),
        }
    }

    #[test]
    fn lines_live_as_long_as_they_may() {
        let folder = tempfile::tempdir().unwrap();
        let mut transcript = Transcript::of(folder.path(), 2);
        for hour in [100, 101, 102, 103] {
            transcript.write(&line(hour, "a", "c")).unwrap();
        }
        transcript.expire(103 * HOUR_MS + 9);
        let mut hours: Vec<u64> = transcript.files().into_iter().map(|(hour, _)| hour).collect();
        hours.sort_unstable();
        assert_eq!(hours, [101, 102, 103]);
        // Switched off: what is left goes.
        Transcript::of(folder.path(), 0).expire(103 * HOUR_MS);
        assert!(transcript.files().is_empty());
    }

    #[test]
    fn what_is_erased_is_not_in_the_files() {
        let folder = tempfile::tempdir().unwrap();
        let transcript = Transcript::of(folder.path(), 2);
        for (id, client) in [("a", "x"), ("b", "x"), ("a", "y")] {
            transcript.write(&line(100, id, client)).unwrap();
        }
        assert_eq!(transcript.erase(|line| line.client == "x").unwrap(), 2);
        let (_, path) = transcript.files().remove(0);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains("\"y\"") && !text.contains("\"x\""), "{text}");
        fs::write(&path, format!("{text}{{\"at\": 1, \"id\": \"torn")).unwrap();
        assert_eq!(transcript.erase(|line| line.id == "nobody").unwrap(), 1);
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }
}
