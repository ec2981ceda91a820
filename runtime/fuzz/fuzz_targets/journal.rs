//! A journal's file, as a crash or a bad card may leave it.
//!
//! What can be read is read again alike after more was written; what the records add up to is the same after a
//! compaction. The first byte says whether the rest is a file, or payloads (one a line) that are put into whole
//! records, because no fuzzer guesses a checksum.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use pipit_fuzz::journal::table::{Bounds, Table};
use pipit_fuzz::journal::{Journal, JournalError, Record};
use tempfile::TempDir;

/// A folder in memory where there is such a file system.
static FOLDER: LazyLock<TempDir> = LazyLock::new(|| {
    let memory = PathBuf::from("/dev/shm");
    match memory.is_dir() {
        true => tempfile::tempdir_in(memory),
        false => tempfile::tempdir(),
    }
    .expect("a temporary folder")
});

fn framed(payloads: &[u8]) -> Vec<u8> {
    let mut file = b"PIPITJ1\n".to_vec();
    for payload in payloads.split(|byte| *byte == b'\n') {
        file.extend((payload.len() as u32).to_le_bytes());
        file.extend(crc32fast::hash(payload).to_le_bytes());
        file.extend(payload);
    }
    file
}

fuzz_target!(|data: &[u8]| {
    let Some((kind, rest)) = data.split_first() else {
        return;
    };
    let content = if kind % 2 == 0 { rest.to_vec() } else { framed(rest) };
    let path = FOLDER.path().join("journal");
    std::fs::write(&path, &content).expect("a file in memory");
    let (mut journal, replayed) = match Journal::open(&path) {
        Ok(opened) => opened,
        Err(JournalError::Foreign { .. }) => {
            assert_eq!(std::fs::read(&path).unwrap(), content, "a foreign file is kept");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let more = Record::Erased { key: ("reply/x".to_owned(), "x".to_owned()) };
    journal.append(std::slice::from_ref(&more)).unwrap();
    drop(journal);
    let (mut journal, again) = Journal::open(&path).unwrap();
    assert_eq!(again.dropped_bytes, 0);
    let (last, before) = again.records.split_last().unwrap();
    assert_eq!((last, before), (&more, &replayed.records[..]));

    let mut table = Table::from_records(again.records);
    journal.compact(&table.records()).unwrap();
    drop(journal);
    let compacted = Table::from_records(Journal::open(&path).unwrap().1.records);
    assert_eq!(compacted.records(), table.records());
    assert_eq!(compacted.bytes(), table.bytes());
    table.evict(Bounds { bytes: 100, age_ms: 1000 }, u64::MAX / 2);
    assert!(Table::from_records(table.records()).bytes() == table.bytes());
});
