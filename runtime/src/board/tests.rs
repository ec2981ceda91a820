//! Every file that ships, and files that are wrong.

use std::collections::BTreeSet;
use std::fs;

use super::*;

const WRITE: &str = "PIPIT_WRITE_REFERENCE";

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Names of the files of a folder.
fn names(folder: &str) -> BTreeSet<String> {
    fs::read_dir(repository().join("firmware-configs").join(folder))
        .unwrap()
        .map(|entry| {
            entry
                .unwrap()
                .file_name()
                .into_string()
                .unwrap()
                .replace(".toml", "")
        })
        .collect()
}

#[test]
fn every_file_is_in_the_program_and_resolves() {
    let set = |files: &[(&str, &str)]| {
        files
            .iter()
            .map(|(id, _)| (*id).to_owned())
            .collect::<BTreeSet<_>>()
    };
    assert_eq!(set(builtin::BOARDS), names("boards"));
    assert_eq!(set(builtin::SOCS), names("socs"));
    let boards = Board::all().unwrap_or_else(|error| panic!("{error}"));
    let used: BTreeSet<String> = boards.iter().map(|board| board.soc_name.clone()).collect();
    assert_eq!(used, names("socs"), "a SoC without a board is tested by nothing");
    let mut compatible = BTreeSet::new();
    for board in &boards {
        for name in &board.compatible {
            assert!(compatible.insert(name), "{name} is two boards");
        }
        // The same file, as a user's own.
        let path = repository().join(format!("firmware-configs/boards/{}.toml", board.id));
        assert_eq!(&Board::find(path.to_str().unwrap()).unwrap(), board);
    }
}

#[test]
fn kernels_are_those_of_the_cores() {
    let kernels = |name| Board::find(name).unwrap().soc.kernels();
    assert_eq!(kernels("raspberry-pi-4"), ["NEON"]);
    assert_eq!(kernels("raspberry-pi-zero-2-w"), ["NEON"]);
    assert_eq!(kernels("raspberry-pi-5"), ["NEON", "FP16_VA", "DOTPROD"]);
    assert_eq!(kernels("jetson-orin-nano"), kernels("raspberry-pi-5"));
    assert_eq!(
        kernels("generic-armv9"),
        ["NEON", "FP16_VA", "DOTPROD", "MATMUL_INT8", "SVE"]
    );
    assert_eq!(kernels("generic-armv7"), ["NEON"]);
    assert!(kernels("visionfive-2").is_empty());
    assert_eq!(
        Board::find("orange-pi-5").unwrap().threads(),
        4,
        "the slow cores of an RK3588 are no help"
    );
}

#[test]
fn the_device_tree_says_which_board_this_is() {
    let root = tempfile::tempdir().unwrap();
    assert_eq!(Board::here(root.path()), None);
    fs::create_dir_all(root.path().join("proc/device-tree")).unwrap();
    let file = root.path().join("proc/device-tree/compatible");
    fs::write(&file, "raspberrypi,5-model-b\0brcm,bcm2712\0").unwrap();
    assert_eq!(Board::here(root.path()).unwrap().id, "raspberry-pi-5");
    fs::write(&file, "somebody,else\0").unwrap();
    assert_eq!(Board::here(root.path()), None);
}

const SOC: &str = "name = \"mine\"\ntriple = \"aarch64-unknown-linux-gnu\"\nmarch = \"armv8.2-a+dotprod\"\n\
    features = [\"neon\", \"crc\", \"lse\", \"dotprod\"]\nqemu_cpu = \"cortex-a76\"\n[[cores]]\nkind = \"A55\"\ncount = 4\n";
const BOARD: &str = "name = \"mine\"\nsoc = \"./soc.toml\"\ntier = \"community\"\nmaintainer = \"me\"\n\
    [memory]\nmib = [1024]\n[recommended]\nmodel = \"m\"\nquantisation = \"Q4_0\"\nn_ctx = 512\ncache_type = \"f16\"\nslots = 1\n";

/// A user's own two files, with something replaced.
fn own(board: (&str, &str), soc: (&str, &str)) -> Result<Board, BoardError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("board.toml");
    assert!(BOARD.contains(board.0) && SOC.contains(soc.0));
    fs::write(&path, BOARD.replacen(board.0, board.1, 1)).unwrap();
    fs::write(folder.path().join("soc.toml"), SOC.replacen(soc.0, soc.1, 1)).unwrap();
    Board::find(path.to_str().unwrap())
}

#[test]
fn a_file_of_ones_own() {
    let board = own(("", ""), ("", "")).unwrap();
    assert_eq!((board.id.as_str(), board.threads()), ("board", 4));
    assert_eq!(board.soc.kernels(), ["NEON", "DOTPROD"]);
}

#[test]
fn what_is_wrong_is_named() {
    for (board, soc, says) in [
        (("n_ctx = 512", "n_ctx = 5"), ("", ""), "recommended.n_ctx"),
        (("f16", "f17"), ("", ""), "recommended.cache_type"),
        (
            ("slots = 1", "slots = 1\nthreads = 5"),
            ("", ""),
            "recommended.threads",
        ),
        (("[1024]", "[]"), ("", ""), "memory.mib"),
        (
            ("[1024]", "[1024]\npeak_gb_per_second = 3.0"),
            ("", ""),
            "memory.source",
        ),
        (
            ("soc = \"./soc.toml\"", "soc = \"z80\""),
            ("", ""),
            "no SoC is called `z80`",
        ),
        (("maintainer", "maintained"), ("", ""), "maintained"),
        (("community", "gold"), ("", ""), "gold"),
        (("", ""), ("dotprod\"\nf", "i8mm\"\nf"), "needs i8mm"),
        (("", ""), ("armv8.2-a", "z80"), "a level that is not known"),
        (("", ""), ("aarch64", "mips"), "is not built for"),
    ] {
        let error = own(board, soc).unwrap_err().to_string();
        assert!(
            error.contains(says) && error.contains("hint: "),
            "{says}: {error}"
        );
    }
    let error = Board::find("raspberrypi5").unwrap_err().to_string();
    assert!(error.contains("did you mean `raspberry-pi-5`?"), "{error}");
    assert!(matches!(
        Board::find("./nowhere.toml"),
        Err(BoardError::Io { .. })
    ));
}

#[test]
fn the_tables_are_current() {
    let boards = Board::all().unwrap();
    for (file, table) in [
        ("firmware-configs/README.md", overview(&boards)),
        ("docs/boards.md", speeds(&boards)),
    ] {
        let path = repository().join(file);
        let text = fs::read_to_string(&path).unwrap();
        let (begin, end) = ("<!-- boards: begin -->\n", "<!-- boards: end -->");
        let (before, rest) = text.split_once(begin).unwrap();
        let (found, after) = rest.split_once(end).unwrap();
        if std::env::var_os(WRITE).is_some() {
            fs::write(&path, format!("{before}{begin}{table}{end}{after}")).unwrap();
            continue;
        }
        assert_eq!(
            found, table,
            "{file} is stale; hint: {WRITE}=1 cargo test -p pipit --lib the_tables"
        );
    }
}
