use proptest::prelude::*;

use super::table::{Bounds, Stage, Table};
use super::*;
use crate::wire::{Message, Role, Sampling};

fn request(id: &str) -> Request {
    Request {
        id: id.to_owned(),
        fingerprint: None,
        reply: Reply {
            topic: "reply/me".to_owned(),
            correlation: Some(vec![0, 255]),
            plain: false,
        },
        messages: vec![Message {
            role: Role::User,
            content: "hello".to_owned(),
        }],
        sampling: Sampling::default(),
        max_tokens: 5,
        stop: vec!["x".to_owned()],
        schema: Some(serde_json::json!({"type": "object"})),
        adapter: Some("home".to_owned()),
        stream: true,
        deadline_ms: Some(9),
        priority: 1,
        from_pool: false,
    }
}

fn key(id: &str) -> Key {
    request(id).key()
}

fn accepted(id: &str) -> Record {
    Record::Accepted {
        at: 1,
        request: Box::new(request(id)),
    }
}

fn done(id: &str, body: &str) -> Record {
    let answer = StoredAnswer {
        reply: request(id).reply,
        body: body.to_owned(),
        json: true,
        error: None,
        fingerprint: None,
    };
    Record::Done {
        at: 2,
        key: key(id),
        answer: Box::new(answer),
    }
}

fn delivered(id: &str) -> Record {
    Record::Delivered { key: key(id) }
}

fn reopen(path: &Path) -> Vec<Record> {
    Journal::open(path).unwrap().1.records
}

#[test]
fn what_was_written_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal");
    let (mut journal, replayed) = Journal::open(&path).unwrap();
    assert!(replayed.records.is_empty());
    let records = [accepted("a"), done("a", "{}"), delivered("a"), accepted("b")];
    journal.append(&records[..1]).unwrap();
    journal.append(&records[1..]).unwrap();
    journal.sync().unwrap();
    drop(journal);
    assert_eq!(reopen(&path), records);
}

#[test]
fn a_torn_tail_is_dropped_at_every_byte() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal");
    let (mut journal, _) = Journal::open(&path).unwrap();
    journal.append(&[accepted("a")]).unwrap();
    let whole = journal.bytes();
    journal.append(&[done("a", "answer")]).unwrap();
    drop(journal);
    let content = std::fs::read(&path).unwrap();
    for cut in 0..content.len() as u64 {
        std::fs::write(&path, &content[..cut as usize]).unwrap();
        let (mut journal, replayed) = Journal::open(&path).unwrap();
        let expected = if cut < whole { vec![] } else { vec![accepted("a")] };
        assert_eq!(replayed.records, expected, "cut at {cut}");
        // And it can be written to again.
        journal.append(&[accepted("later")]).unwrap();
        drop(journal);
        assert_eq!(reopen(&path).last(), Some(&accepted("later")), "cut at {cut}");
    }
}

#[test]
fn a_foreign_file_is_refused_and_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal");
    std::fs::write(&path, b"something else entirely").unwrap();
    assert!(matches!(Journal::open(&path), Err(JournalError::Foreign { .. })));
    assert_eq!(std::fs::read(&path).unwrap(), b"something else entirely");
}

#[test]
fn a_full_disk_leaves_the_journal_whole() {
    let path = Path::new("/dev/full");
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut journal = Journal {
        path: path.to_owned(),
        file,
        bytes: 8,
        synced: 8,
    };
    let error = journal.append(&[accepted("a")]).unwrap_err();
    assert!(error.to_string().contains("No space left"), "{error}");
    assert_eq!(journal.bytes(), 8);
}

#[test]
fn what_could_not_be_synced_is_cut_off() {
    // Takes every write and refuses every sync.
    let path = Path::new("/dev/null");
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut journal = Journal {
        path: path.to_owned(),
        file,
        bytes: 8,
        synced: 8,
    };
    journal.append(&[accepted("a")]).unwrap();
    assert!(journal.bytes() > 8);
    let error = journal.sync().unwrap_err();
    assert!(error.to_string().contains("sync"), "{error}");
    assert_eq!(journal.bytes(), 8);
}

#[test]
fn compaction_keeps_the_sum() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal");
    let (mut journal, _) = Journal::open(&path).unwrap();
    let mut table = Table::default();
    for round in 0..50 {
        let id = format!("r{round}");
        let mut records = vec![accepted(&id), done(&id, "text"), delivered(&id)];
        if round > 47 {
            records.truncate(round - 47);
        }
        journal.append(&records).unwrap();
        records.into_iter().for_each(|record| table.apply(record));
    }
    let bounds = Bounds {
        bytes: 4000,
        age_ms: u64::MAX,
    };
    let erased = table.evict(bounds, 3);
    assert!(!erased.is_empty() && table.bytes() <= 4000);
    let before = journal.bytes();
    journal.compact(&table.records()).unwrap();
    assert!(journal.bytes() < before);
    journal.append(&[accepted("after")]).unwrap();
    drop(journal);
    table.apply(accepted("after"));
    let again = Table::from_records(reopen(&path));
    assert_eq!(again.records(), table.records());
    assert!(!path.with_extension("new").exists());
}

#[test]
fn one_answer_for_an_id() {
    let mut table = Table::from_records(vec![accepted("a"), done("a", "first")]);
    table.apply(done("a", "second"));
    table.apply(accepted("a"));
    let Some(Stage::Done(answer)) = table.stage(&key("a")) else {
        panic!("{:?}", table.stage(&key("a")))
    };
    assert_eq!(answer.body, "first");
    table.apply(delivered("a"));
    assert!(matches!(table.stage(&key("a")), Some(Stage::Delivered(_))));
    // Another client may use the same id.
    assert_eq!(table.stage(&("reply/other".to_owned(), "a".to_owned())), None);
    table.apply(Record::Erased { key: key("a") });
    assert_eq!(table.stage(&key("a")), None);
    assert_eq!(table.bytes(), 0);
}

#[test]
fn what_is_owed_is_never_evicted() {
    let mut table = Table::from_records(vec![
        accepted("a"),
        accepted("b"),
        done("b", "x"),
        accepted("c"),
        done("c", "y"),
        delivered("c"),
    ]);
    let erased = table.evict(Bounds { bytes: 0, age_ms: 0 }, u64::MAX);
    assert_eq!(erased, [Record::Erased { key: key("c") }]);
    assert!(table.stage(&key("a")).is_some() && table.stage(&key("b")).is_some());
}

fn any_record() -> impl Strategy<Value = Record> {
    let id = proptest::sample::select(vec!["a", "b", "c", "d"]);
    (id, 0..4, ".{0,12}").prop_map(|(id, kind, body)| match kind {
        0 => accepted(id),
        1 => done(id, &body),
        2 => delivered(id),
        _ => Record::Erased { key: key(id) },
    })
}

proptest! {
    #[test]
    fn damage_anywhere_never_panics_and_keeps_what_is_before(
        records in proptest::collection::vec(any_record(), 1..8), at in any::<prop::sample::Index>(), bit in 0..8_u32,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let (mut journal, _) = Journal::open(&path).unwrap();
        journal.append(&records).unwrap();
        drop(journal);
        let mut content = std::fs::read(&path).unwrap();
        let at = at.index(content.len());
        content[at] ^= 1 << bit;
        std::fs::write(&path, &content).unwrap();
        match Journal::open(&path) {
            Ok((_, replayed)) => prop_assert!(records.starts_with(&replayed.records)),
            Err(JournalError::Foreign { .. }) => prop_assert!(at < MAGIC.len()),
            Err(error) => prop_assert!(false, "{}", error),
        }
    }

    #[test]
    fn a_table_and_its_records_are_the_same(records in proptest::collection::vec(any_record(), 0..30)) {
        let table = Table::from_records(records);
        let again = Table::from_records(table.records());
        prop_assert_eq!(again.records(), table.records());
        prop_assert_eq!(again.bytes(), table.bytes());
    }
}
