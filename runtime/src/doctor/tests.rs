//! The doctor on machines that are not there.

use std::fs;

use super::*;
use crate::model::tests::gguf;

fn worst(findings: &[Finding], what: &str) -> State {
    findings
        .iter()
        .find(|finding| finding.what == what)
        .unwrap_or_else(|| panic!("nothing about {what}"))
        .state
}

/// A root with a machine of so much memory, a model and a state folder on it.
fn machine(available_kib: u64) -> (tempfile::TempDir, Config) {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    fs::create_dir_all(root.join("proc")).unwrap();
    fs::write(
        root.join("proc/meminfo"),
        format!("MemAvailable: {available_kib} kB\n"),
    )
    .unwrap();
    let path = root.join("m.gguf");
    fs::write(&path, gguf(&[])).unwrap();
    let mut config = Config {
        state_dir: Some(root.join("state")),
        ..Config::default()
    };
    config.model.path = Some(path);
    (folder, config)
}

#[test]
fn a_model_that_fits_and_one_that_does_not() {
    let (folder, config) = machine(4 << 20);
    let findings = look(&config, folder.path());
    for what in ["model", "memory", "state folder", "clock"] {
        assert_eq!(worst(&findings, what), State::Ok, "{findings:#?}");
    }
    assert_eq!(worst(&findings, "signature"), State::Info);

    let (folder, config) = machine(16 << 10);
    let findings = look(&config, folder.path());
    let memory = findings.iter().find(|finding| finding.what == "memory").unwrap();
    assert_eq!(memory.state, State::Fail);
    assert!(memory.hint.is_some(), "{memory:?}");
}

#[test]
fn a_model_that_is_not_there_or_damaged() {
    let (folder, mut config) = machine(4 << 20);
    fs::write(folder.path().join("m.gguf"), b"GGUF").unwrap();
    assert_eq!(worst(&look(&config, folder.path()), "model"), State::Fail);
    config.model.path = None;
    let findings = look(&config, folder.path());
    assert_eq!(worst(&findings, "model"), State::Fail);
    let hint = findings
        .iter()
        .find_map(|finding| finding.hint.as_deref())
        .unwrap();
    assert!(!hint.is_empty());
}

#[test]
fn the_hint_of_an_error_is_told_apart() {
    let finding = Finding::of_error("model", &"model x: gone; hint: copy it");
    assert_eq!(
        (finding.says.as_str(), finding.hint.as_deref()),
        ("model x: gone", Some("copy it"))
    );
}

#[cfg(feature = "http")]
#[test]
fn a_door_whose_place_is_free_or_taken() {
    let (folder, mut config) = machine(4 << 20);
    assert!(
        look(&config, folder.path())
            .iter()
            .all(|finding| finding.what != "http")
    );
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let mut door = |listen: String| {
        config.http.listen = Some(listen);
        worst(&look(&config, folder.path()), "http")
    };
    assert_eq!(door(address.to_string()), State::Fail);
    drop(taken);
    assert_eq!(door(address.to_string()), State::Ok);
    assert_eq!(door("somewhere".to_owned()), State::Fail);

    let socket = folder.path().join("http.sock");
    let unix = |path: &Path| format!("unix:{}", path.display());
    assert_eq!(door(unix(&socket)), State::Ok);
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    assert_eq!(door(unix(&socket)), State::Fail);
    drop(listener);
    assert_eq!(door(unix(&socket)), State::Ok, "it will be replaced");
    let file = folder.path().join("no-socket");
    std::fs::write(&file, "").unwrap();
    assert_eq!(door(unix(&file)), State::Fail, "it will not");
    assert_eq!(door(unix(&folder.path().join("nowhere/http.sock"))), State::Fail);
}
