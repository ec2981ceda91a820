//! What was answered so far, on disk after every batch: a run that is stopped or killed goes on from there.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use pipit_convert::output::OutputFile;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{GenerateError, Outcome, Place, Settings};

/// One line of the file, but for the first, which holds the settings.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    #[serde(flatten)]
    place: Place,
    outcome: Outcome,
}

/// The outcomes of a run that is not done.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    done: BTreeMap<Place, Outcome>,
}

impl Journal {
    /// Where the unfinished answers for a file stand.
    pub fn path_for(output: &Path) -> PathBuf {
        output.with_added_extension("partial")
    }

    /// Where what gave no row is written: `F.rejected.jsonl` beside `F.jsonl`.
    pub fn rejected_path(output: &Path) -> PathBuf {
        output.with_extension("rejected.jsonl")
    }

    /// Begins, or goes on with what a run with the same settings has left.
    pub fn open(output: &Path, settings: &Settings) -> Result<Self, GenerateError> {
        let path = Self::path_for(output);
        let failed = |source| GenerateError::Journal {
            path: path.clone(),
            source,
        };
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(&path)
            .map_err(failed)?;
        // Where the file system has no locks, nobody is kept out.
        if let Err(std::fs::TryLockError::WouldBlock) = file.try_lock() {
            return Err(GenerateError::Busy { path });
        }
        let bytes = std::fs::read(&path).map_err(failed)?;
        // A line that was being written when the process was killed is none.
        let whole = bytes
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |at| at + 1);
        let mut journal = Self {
            done: BTreeMap::new(),
            path: path.clone(),
            file,
        };
        let wanted = serde_json::to_value(settings).map_err(|e| failed(e.into()))?;
        if whole == 0 {
            journal.file.set_len(0).map_err(failed)?;
            journal.append(&[format!("{wanted}\n")])?;
            return Ok(journal);
        }
        let no = |why: String| GenerateError::NoJournal {
            path: path.clone(),
            why,
        };
        let mut lines = bytes[..whole]
            .split(|byte| *byte == b'\n')
            .filter(|line| !line.is_empty());
        let found: Value =
            serde_json::from_slice(lines.next().unwrap_or_default()).map_err(|e| no(e.to_string()))?;
        for (key, value) in wanted.as_object().into_iter().flatten() {
            if found[key] != *value {
                return Err(GenerateError::Settings {
                    path,
                    key: key.clone(),
                    found: found[key].to_string(),
                    wanted: value.to_string(),
                });
            }
        }
        for (i, line) in lines.enumerate() {
            let line: Line = serde_json::from_slice(line).map_err(|e| no(format!("line {}: {e}", i + 2)))?;
            journal.done.insert(line.place, line.outcome);
        }
        journal.file.set_len(whole as u64).map_err(failed)?;
        Ok(journal)
    }

    /// What is known.
    pub fn done(&self) -> &BTreeMap<Place, Outcome> {
        &self.done
    }

    /// Takes up what became of some answers; it is on disk when this returns.
    pub fn add(&mut self, outcomes: Vec<(Place, Outcome)>) -> Result<(), GenerateError> {
        let line = |(place, outcome): &(Place, Outcome)| {
            let line = Line {
                place: *place,
                outcome: outcome.clone(),
            };
            serde_json::to_string(&line).map(|text| format!("{text}\n"))
        };
        let lines: Result<Vec<String>, _> = outcomes.iter().map(line).collect();
        self.append(&lines.map_err(|e| self.failed(e.into()))?)?;
        self.done.extend(outcomes);
        Ok(())
    }

    fn append(&mut self, lines: &[String]) -> Result<(), GenerateError> {
        let written = self.file.write_all(lines.concat().as_bytes());
        written
            .and_then(|()| self.file.sync_data())
            .map_err(|e| self.failed(e))
    }

    fn failed(&self, source: io::Error) -> GenerateError {
        GenerateError::Journal {
            path: self.path.clone(),
            source,
        }
    }

    /// Writes the rows in the order of their prompts, and what gave none beside them, and removes the journal.
    pub fn finish(self, output: &Path) -> io::Result<()> {
        let rejected_path = Self::rejected_path(output);
        let (mut rows, mut rejected) = (OutputFile::create(output)?, OutputFile::create(&rejected_path)?);
        let mut any = false;
        for (place, outcome) in &self.done {
            match outcome {
                Outcome::Row(row) => writeln!(rows.file_mut(), "{}", serde_json::to_string(row)?)?,
                Outcome::Rejected { why, answer } => {
                    any = true;
                    let line = serde_json::json!({"line": place.line, "generation": place.generation, "why": why,
                        "answer": answer});
                    writeln!(rejected.file_mut(), "{line}")?;
                }
            }
        }
        match any {
            true => rejected.commit()?,
            // One of an earlier run would say what is no longer so.
            false => match std::fs::remove_file(&rejected_path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => drop(rejected),
            },
        }
        rows.commit()?;
        std::fs::remove_file(&self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings {
            teacher: "t".into(),
            adapter: None,
            model: None,
            prompts_sha256: "aa".into(),
            max_rows: None,
            temperature: 0.1,
            top_k: 0,
            top_p: 1.0,
            max_new_tokens: 8,
            num_generations: 1,
            seed: 42,
            keep_cut: false,
        }
    }

    fn outcome(line: usize) -> (Place, Outcome) {
        let place = Place { line, generation: 0 };
        let outcome = match line % 2 {
            0 => Outcome::Rejected {
                why: "an empty answer".into(),
                answer: None,
            },
            _ => Outcome::Row(serde_json::Map::from_iter([("line".to_owned(), line.into())])),
        };
        (place, outcome)
    }

    #[test]
    fn a_killed_run_goes_on_and_gives_the_same_file() {
        let dir = tempfile::tempdir().unwrap();
        let (whole, killed) = (dir.path().join("whole.jsonl"), dir.path().join("killed.jsonl"));
        let mut journal = Journal::open(&whole, &settings()).unwrap();
        journal.add((1..6).map(outcome).collect()).unwrap();
        journal.finish(&whole).unwrap();

        let mut journal = Journal::open(&killed, &settings()).unwrap();
        journal.add(vec![outcome(4), outcome(3)]).unwrap();
        drop(journal);
        let partial = Journal::path_for(&killed);
        let bytes = std::fs::read(&partial).unwrap();
        std::fs::write(&partial, [&bytes[..], b"{\"line\":5,\"gen"].concat()).unwrap();
        let mut journal = Journal::open(&killed, &settings()).unwrap();
        assert_eq!(
            journal.done().keys().map(|place| place.line).collect::<Vec<_>>(),
            [3, 4]
        );
        journal.add(vec![outcome(5), outcome(2), outcome(1)]).unwrap();
        assert!(matches!(
            Journal::open(&killed, &settings()),
            Err(GenerateError::Busy { .. })
        ));
        journal.finish(&killed).unwrap();
        assert!(!partial.exists());
        let read = |path: &Path| std::fs::read_to_string(path).unwrap();
        assert_eq!(read(&killed), read(&whole));
        assert_eq!(read(&killed), "{\"line\":1}\n{\"line\":3}\n{\"line\":5}\n");
        let rejected = [&whole, &killed].map(|path| read(&Journal::rejected_path(path)));
        assert_eq!(rejected[0], rejected[1]);
        assert_eq!(rejected[0].lines().count(), 2);
    }

    #[test]
    fn other_settings_and_other_files_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("answers.jsonl");
        drop(Journal::open(&output, &settings()).unwrap());
        let other = Settings {
            temperature: 0.7,
            ..settings()
        };
        let error = Journal::open(&output, &other).unwrap_err().to_string();
        assert!(
            error.contains("`temperature` is 0.1 there and 0.7 here"),
            "{error}"
        );
        std::fs::write(Journal::path_for(&output), "a thesis\n").unwrap();
        assert!(matches!(
            Journal::open(&output, &settings()),
            Err(GenerateError::NoJournal { .. })
        ));
    }
}
