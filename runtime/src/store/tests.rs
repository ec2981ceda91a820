use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::path::PathBuf;

use minisign::KeyPair;

use super::manifest::FileEntry;
use super::place::GivenUp;
use super::*;
use crate::wire::request::hex;

fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest as _;
    hex(&sha2::Sha256::digest(bytes))
}

fn manifest_of(content: &[u8]) -> Manifest {
    let file = FileEntry {
        file: "m.gguf".to_owned(),
        sha256: sha256(content),
        bytes: content.len() as u64,
    };
    Manifest::new("m", "1", file)
}

fn sign(pair: &KeyPair, bytes: &[u8]) -> Vec<u8> {
    let signed = minisign::sign(Some(&pair.pk), &pair.sk, bytes, None, None).unwrap();
    signed.to_string().into_bytes()
}

fn keys_of(pairs: &[&KeyPair], allow_unsigned: bool) -> Keys {
    let trusted: Vec<String> = pairs.iter().map(|pair| pair.pk.to_base64()).collect();
    Keys::new(&trusted, allow_unsigned).unwrap()
}

#[test]
fn a_signature_is_good_when_a_trusted_key_made_it_over_these_bytes() {
    let (ours, theirs) = (
        KeyPair::generate_unencrypted_keypair().unwrap(),
        KeyPair::generate_unencrypted_keypair().unwrap(),
    );
    let manifest = b"{\"name\": \"m\"}".to_vec();
    let (good, other) = (sign(&ours, &manifest), sign(&theirs, &manifest));
    let ours_only = keys_of(&[&ours], false);
    assert!(ours_only.verify(&manifest, Some(&good), "m").is_ok());
    assert!(
        keys_of(&[&theirs, &ours], false)
            .verify(&manifest, Some(&good), "m")
            .is_ok()
    );
    for (bytes, signature) in [
        (&b"{\"name\": \"n\"}"[..], &good),
        (&manifest[..], &other),
        (&manifest[..], &good[..good.len() / 2].to_vec()),
        (&manifest[..], &b"\xff".to_vec()),
    ] {
        let error = ours_only.verify(bytes, Some(signature), "m").unwrap_err();
        assert!(matches!(error, StoreError::Signature { .. }), "{error}");
    }
    // The trusted comment is signed, too.
    let forged = String::from_utf8(good.clone())
        .unwrap()
        .replace("timestamp:", "timestamp:1");
    assert!(ours_only.verify(&manifest, Some(forged.as_bytes()), "m").is_err());
    assert!(matches!(
        ours_only.verify(&manifest, None, "m"),
        Err(StoreError::Unsigned { .. })
    ));
    assert!(matches!(
        keys_of(&[], false).verify(&manifest, Some(&good), "m"),
        Err(StoreError::NoKeys)
    ));
    assert!(keys_of(&[], true).verify(&manifest, None, "m").is_ok());
    // Where keys are known, a wrong signature is wrong, also when none would do.
    let lenient = keys_of(&[&ours], true);
    assert!(lenient.verify(&manifest, None, "m").is_ok());
    assert!(lenient.verify(&manifest, Some(&other), "m").is_err());
    assert!(Keys::new(&["RWQ".to_owned()], false).is_err());
}

#[test]
fn a_manifest_that_says_what_cannot_be_is_refused_by_name() {
    let good = serde_json::to_value(manifest_of(b"x")).unwrap();
    assert!(Manifest::parse(good.to_string().as_bytes(), "m").is_ok());
    let adapter =
        serde_json::json!({"file": "a.gguf", "sha256": "0".repeat(64), "bytes": 1, "base": "1".repeat(64)});
    for (key, value, why) in [
        ("pipit_model", serde_json::json!(2), "reads 1"),
        ("name", serde_json::json!("a/b"), "`name`"),
        ("version", serde_json::json!(""), "`version`"),
        ("min_pipit", serde_json::json!("99.0"), "needs Pipit 99.0"),
        ("min_pipit", serde_json::json!("new"), "no version"),
        ("surprise", serde_json::json!(1), "surprise"),
        (
            "adapters",
            serde_json::json!({"a": adapter}),
            "belongs to the base 1111",
        ),
        (
            "golden",
            serde_json::json!([{"messages": [], "max_tokens": 1}]),
            "golden prompt 0",
        ),
        (
            "golden",
            serde_json::json!([{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "adapter": "z"}]),
            "no adapter `z`",
        ),
        (
            "model",
            serde_json::json!({"file": "../x.gguf", "sha256": "0".repeat(64), "bytes": 1}),
            "no name of a file",
        ),
        (
            "model",
            serde_json::json!({"file": "x.bin", "sha256": "0".repeat(64), "bytes": 1}),
            ".gguf",
        ),
        (
            "model",
            serde_json::json!({"file": "x.gguf", "sha256": "0", "bytes": 1}),
            "64 hexadecimal",
        ),
    ] {
        let mut wrong = good.clone();
        wrong[key] = value;
        let error = Manifest::parse(wrong.to_string().as_bytes(), "m").unwrap_err();
        assert!(error.to_string().contains(why), "{error}");
    }
}

#[test]
fn golden_answers() {
    let golden = |text: Option<&str>, contains: Option<&str>| manifest::Golden {
        messages: Vec::new(),
        max_tokens: 1,
        adapter: None,
        text: text.map(ToOwned::to_owned),
        contains: contains.map(ToOwned::to_owned),
    };
    assert!(golden(Some("on"), None).judge("on").is_ok());
    assert!(golden(Some("on"), None).judge("on.").is_err());
    assert!(golden(None, Some("on")).judge("turn on!").is_ok());
    assert!(golden(None, Some("on")).judge("off").is_err());
    assert!(golden(None, None).judge("x").is_ok());
    assert!(golden(None, None).judge(" \n").is_err());
}

#[test]
fn places_go_forth_and_back() {
    let first = Place::default().activated("a");
    assert_eq!((first.active.as_str(), &first.previous), ("a", &None));
    assert!(first.rolled_back().is_err());
    let second = first.activated("b");
    assert_eq!(second.previous.as_deref(), Some("a"));
    assert_eq!(second.activated("b").previous.as_deref(), Some("a"));
    let back = second.rolled_back().unwrap();
    assert_eq!((back.active.as_str(), back.previous.as_deref()), ("a", Some("b")));
    assert_eq!(second.activated("c").previous.as_deref(), Some("b"));
}

/// A store that holds the contents as models `m-…`, in this order.
fn store_of(folder: &Path, contents: &[&[u8]]) -> (Store, Vec<String>) {
    let store = Store::of(folder);
    store.make().unwrap();
    let ids = contents.iter().map(|content| {
        let manifest = manifest_of(content);
        let bytes = serde_json::to_vec(&manifest).unwrap();
        let id = manifest.id(&bytes);
        std::fs::write(store.file(&manifest.model.sha256), content).unwrap();
        write_whole(&store.manifest_path(&id), &bytes).unwrap();
        id
    });
    let ids = ids.collect();
    (store, ids)
}

#[test]
fn what_nobody_needs_goes_and_what_is_shared_stays() {
    let folder = tempfile::tempdir().unwrap();
    let (store, ids) = store_of(folder.path(), &[b"a", b"b", b"c"]);
    std::fs::write(store.part(&sha256(b"d")), "d").unwrap();
    let place = Place::default().activated(&ids[0]).activated(&ids[2]);
    store.clean(&place, &[]);
    assert_eq!(store.ids().len(), 2);
    assert!(store.manifest(&ids[1]).is_err());
    assert!(store.file(&sha256(b"a")).exists() && store.file(&sha256(b"c")).exists());
    assert!(!store.file(&sha256(b"b")).exists() && !store.part(&sha256(b"d")).exists());
}

#[test]
fn a_rollback_that_comes_again_after_a_power_cut_is_done_once() {
    let folder = tempfile::tempdir().unwrap();
    let (store, ids) = store_of(folder.path(), &[b"a", b"b"]);
    assert!(install::roll_back(&store, None).is_err());
    for id in &ids {
        store.change(|place| Ok(place.activated(id))).unwrap();
    }
    for again in [false, true] {
        let done = install::roll_back(&store, Some(&ids[1])).unwrap();
        assert_eq!((&done.model, done.unchanged), (&ids[0], again));
    }
    // Ordered anew, it goes forth again.
    assert_eq!(install::roll_back(&store, Some(&ids[0])).unwrap().model, ids[1]);
}

#[test]
fn a_place_file_of_garbage_falls_back_to_what_is_whole() {
    let folder = tempfile::tempdir().unwrap();
    let (store, ids) = store_of(folder.path(), &[b"whole", b"cut short"]);
    store.change(|place| Ok(place.activated(&ids[1]))).unwrap();
    let before = store.stamp();
    assert_eq!(store.place().unwrap().active, ids[1]);
    std::fs::write(store.file(&sha256(b"cut short")), "cut").unwrap();
    std::fs::write(store.place_path(), b"{\"active\": \"m-").unwrap();
    assert_eq!(store.place().unwrap().active, ids[0]);
    assert_ne!(store.stamp(), before);
    let given_up = GivenUp {
        id: "x".to_owned(),
        why: "y".to_owned(),
    };
    let place = store.change(|place| {
        Ok(Place {
            given_up: Some(given_up.clone()),
            ..place
        })
    });
    assert_eq!(store.place(), Some(place.unwrap()));
}

#[test]
fn one_installation_at_a_time_and_room_only_while_somebody_asks() {
    let folder = tempfile::tempdir().unwrap();
    let (store, _) = store_of(folder.path(), &[]);
    let first = store.lock_installation().unwrap();
    assert!(matches!(store.lock_installation(), Err(StoreError::Busy)));
    drop(first);
    assert!(store.lock_installation().is_ok());
    assert!(!store.room_is_wanted());
    let room = store.make_room().unwrap();
    assert!(store.room_is_wanted());
    drop(room);
    assert!(!store.room_is_wanted());
}

/// Serves one file, and breaks off after `most` bytes of a body; returns its URL and the ranges that were asked for.
fn server(
    content: Vec<u8>,
    most: usize,
    ranges: bool,
) -> (String, std::sync::Arc<std::sync::Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/f/manifest.json", listener.local_addr().unwrap());
    let asked = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = std::sync::Arc::clone(&asked);
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let mut reader = BufReader::new(stream);
            let mut from = 0;
            for line in reader.by_ref().lines().map_while(Result::ok) {
                let line = line.to_ascii_lowercase();
                if let Some(range) = line.strip_prefix("range: bytes=") {
                    seen.lock().unwrap().push(range.to_owned());
                    from = range.trim_end_matches('-').parse().unwrap();
                }
                if line.is_empty() {
                    break;
                }
            }
            let mut stream = reader.into_inner();
            let from = if ranges { from } else { 0 };
            let body = &content[from..];
            let head = match from {
                0 => "200 OK\r\n".to_owned(),
                _ => format!(
                    "206 Partial Content\r\nContent-Range: bytes {from}-{}/{}\r\n",
                    content.len() - 1,
                    content.len()
                ),
            };
            let _ = write!(
                stream,
                "HTTP/1.1 {head}Content-Length: {}\r\nConnection: close\r\n\r\n",
                body.len()
            );
            let _ = stream.write_all(&body[..body.len().min(most)]);
        }
    });
    (url, asked)
}

/// Fetches `content` from a server that breaks off every connection after 1000 bytes.
fn fetched(content: &[u8], ranges: bool, there: &[u8]) -> (Result<(), StoreError>, Vec<String>, PathBuf) {
    let folder = tempfile::tempdir().unwrap().keep();
    let (store, _) = store_of(&folder, &[]);
    let entry = manifest_of(content).model;
    std::fs::write(store.part(&entry.sha256), there).unwrap();
    let most = if ranges { 1000 } else { usize::MAX };
    let (url, asked) = server(content.to_vec(), most, ranges);
    let source = Source::url(&url).unwrap();
    let result = install::fetch(&store, &source, &entry, &mut |_| {});
    let asked = asked.lock().unwrap().clone();
    (result, asked, store.file(&entry.sha256))
}

#[test]
fn a_broken_download_goes_on_where_it_stopped() {
    let content: Vec<u8> = (0..3500_u32).map(|at| (at * at / 7) as u8).collect();
    let (result, asked, path) = fetched(&content, true, b"");
    result.unwrap();
    assert_eq!(asked, ["1000-", "2000-", "3000-"]);
    assert_eq!(std::fs::read(path).unwrap(), content);
    // From an earlier process, and from a server that cannot go on.
    let (result, asked, _) = fetched(&content, true, &content[..3400]);
    result.unwrap();
    assert_eq!(asked, ["3400-"]);
    let (result, asked, path) = fetched(&content, false, &content[..3400]);
    result.unwrap();
    assert_eq!(asked, ["3400-"]);
    assert_eq!(std::fs::read(path).unwrap(), content);
}

#[test]
fn what_is_not_what_was_signed_does_not_get_its_name() {
    let content = vec![7_u8; 3500];
    let torn = vec![9_u8; 100];
    let (result, _, path) = fetched(&content, true, &torn);
    assert!(matches!(result, Err(StoreError::Hash { .. })), "{result:?}");
    assert!(!path.exists() && !path.with_extension("part").exists());
}

#[test]
fn urls_that_are_no_manifests() {
    assert!(Source::url("https://h/a/manifest.json").is_ok());
    assert!(Source::url("http://h:1/a/").is_ok());
    for bad in [
        "ftp://h/manifest.json",
        "https://h",
        "https://h/model.gguf",
        "https://u:p@h/manifest.json",
        "https://h/manifest.json?key=1",
        "/etc/passwd.json",
    ] {
        assert!(Source::url(bad).is_err(), "{bad}");
    }
}
