use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn tokens(count: i32) -> Vec<LlamaToken> {
    (0..count).map(LlamaToken).collect()
}

fn settings() -> Settings {
    Settings {
        model: PathBuf::new(),
        n_ctx: 64,
        slots: 1,
        threads: 1,
        cache_type_k: "f16".to_owned(),
        cache_type_v: "f16".to_owned(),
        prefill_chunk: 16,
        prefill_ms: 10,
        adapters: BTreeMap::new(),
        prefix_bytes: 1 << 20,
        prefix_disk: None,
    }
}

fn header(model: &str, count: usize, state: &[u8]) -> Header {
    Header {
        model: model.to_owned(),
        adapter: None,
        cache_types: ("f16".to_owned(), "f16".to_owned()),
        build: BUILD.to_owned(),
        tokens: count,
        state_bytes: state.len(),
    }
}

fn place(folder: &Path, bytes: u64) -> Place {
    Place {
        folder: folder.to_owned(),
        bytes,
        tokens: 4,
    }
}

#[test]
fn the_longest_beginning_of_this_model_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let write_one = |name: &str, model: &str, count: i32| {
        let path = folder.path().join(name);
        write(
            &path,
            &header(model, count as usize, b"state"),
            &tokens(count),
            b"state",
        )
        .unwrap();
        path
    };
    write_one("a.kv", "m", 5);
    let long = write_one("b.kv", "m", 8);
    write_one("c.kv", "other", 9);
    std::fs::write(folder.path().join("d.kv"), b"PIPITKV1 and then nonsense").unwrap();
    std::fs::write(folder.path().join("e.new"), b"left by a crash").unwrap();
    let disk = Disk::open(&place(folder.path(), 1000), "m", &settings());
    assert!(!folder.path().join("e.new").exists());
    let found = disk.find(None, &tokens(20)).unwrap();
    assert_eq!((found.path, found.tokens), (long.clone(), 8));
    assert_eq!(disk.find(None, &tokens(7)).unwrap().tokens, 5);
    assert!(disk.find(Some("x"), &tokens(20)).is_none());
    assert!(disk.find(None, &tokens(3)).is_none());
    assert_eq!(read_state(&long).unwrap(), b"state");
}

#[test]
fn only_what_a_second_prompt_asks_for_and_what_fits() {
    let folder = tempfile::tempdir().unwrap();
    let mut disk = Disk::open(&place(folder.path(), 100), "m", &settings());
    assert!(!disk.wants(1, None, &tokens(3), true), "too short");
    assert!(disk.wants(1, None, &tokens(4), true));
    assert!(!disk.wants(1, None, &tokens(5), false), "shared once");
    assert!(!disk.wants(1, None, &tokens(5), false), "by the same prompt");
    assert!(disk.wants(2, None, &tokens(5), false));
    assert!(!disk.make_room(101));
    for name in ["a.kv", "b.kv"] {
        std::fs::write(folder.path().join(name), [0; 40]).unwrap();
    }
    let mut disk = Disk::open(&place(folder.path(), 100), "m", &settings());
    assert_eq!(disk.foreign.len(), 2);
    assert!(disk.make_room(60));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    assert_eq!(
        (
            worth_keeping(100, 120),
            worth_keeping(100, 70),
            worth_keeping(0, 95)
        ),
        (100, 64, 64)
    );
}

#[test]
fn the_build_is_the_one_that_is_linked() {
    let lock = include_str!("../../../../Cargo.lock");
    let (name, version) = BUILD.split_once(' ').unwrap();
    assert!(
        lock.contains(&format!("name = \"{name}\"\nversion = \"{version}\"")),
        "{BUILD}"
    );
}

proptest! {
    #[test]
    fn damage_is_noticed(at in any::<prop::sample::Index>(), bit in 0..8_u8, cut in any::<prop::sample::Index>()) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.kv");
        let state = [7; 50];
        write(&path, &header("m", 6, &state), &tokens(6), &state).unwrap();
        prop_assert_eq!(read_state(&path).unwrap(), state);
        let whole = std::fs::read(&path).unwrap();
        let mut damaged = whole.clone();
        damaged[at.index(whole.len())] ^= 1 << bit;
        std::fs::write(&path, &damaged).unwrap();
        prop_assert!(read_state(&path).is_err());
        std::fs::write(&path, &whole[..cut.index(whole.len())]).unwrap();
        prop_assert!(read_state(&path).is_err());
    }
}
