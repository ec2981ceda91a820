use std::fs;

use super::*;

/// Folders of a system and a user, and what else is a source.
struct World {
    folder: tempfile::TempDir,
    sources: Sources,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let sources = Sources {
            system: Some(folder.path().join("etc")),
            user: Some(folder.path().join("user")),
            ..Sources::default()
        };
        Self { folder, sources }
    }

    /// Writes a file; the path of it.
    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    fn variable(&mut self, name: &str, text: &str) {
        self.sources.variables.push((name.to_owned(), text.to_owned()));
    }

    fn read(&self) -> Layers {
        Layers::read(&self.sources).unwrap()
    }

    fn problems(&self) -> Vec<String> {
        let problems = Layers::read(&self.sources).unwrap_err();
        problems.0.iter().map(ToString::to_string).collect()
    }
}

fn origin(layers: &Layers, key: &str) -> String {
    layers.origin(&Key::parse(key)).to_string()
}

#[test]
fn without_any_layer_all_is_default() {
    let layers = World::new().read();
    assert_eq!(layers.config, Config::default());
    assert!(layers.files.is_empty() && layers.settings.is_empty());
    assert_eq!(origin(&layers, "model.n_ctx"), "default");
}

#[test]
fn each_layer_comes_before_the_ones_below() {
    let mut world = World::new();
    let n_ctx = |n: u32| format!("[model]\nn_ctx = {n}\n");
    let expect = |world: &World, n: u32, from: &str| {
        let layers = world.read();
        assert_eq!(layers.config.model.n_ctx, n);
        assert_eq!(origin(&layers, "model.n_ctx"), from);
        // What only the lowest layer says stays.
        assert_eq!(layers.config.root, "home");
    };
    let path = world.file(
        "etc/config.toml",
        &format!("# a\nroot = \"home\"\n{}", n_ctx(101)),
    );
    expect(&world, 101, &format!("{}:4", path.display()));
    // By name, whatever the order in which they were written; other files are none.
    let path = world.file("etc/config.d/20-b.toml", &n_ctx(103));
    world.file("etc/config.d/10-a.toml", &n_ctx(102));
    world.file("etc/config.d/30-c.toml.bak", "nonsense");
    expect(&world, 103, &format!("{}:2", path.display()));
    let path = world.file("user/config.toml", "model.n_ctx = 104");
    expect(&world, 104, &format!("{}:1", path.display()));
    world.variable("PIPIT_MODEL__N_CTX", "105");
    expect(&world, 105, "variable PIPIT_MODEL__N_CTX");
    world.sources.flags = vec![Setting::flag("--ctx", "model.n_ctx", 106)];
    expect(&world, 106, "flag --ctx");
    assert_eq!(world.read().files.len(), 4);
}

#[test]
fn a_named_file_replaces_the_searched_ones() {
    let mut world = World::new();
    world.file("etc/config.toml", "root = \"etc\"\nnonsense = 1");
    world.file("user/config.toml", "root = \"user\"");
    let named = world.file("named.toml", "device = \"named\"");
    world.sources.file = Some(named.clone());
    world.variable("PIPIT_GRACE_S", "7");
    let layers = world.read();
    assert_eq!(
        (layers.config.root.as_str(), layers.config.device.as_str()),
        ("pipit", "named")
    );
    assert_eq!(
        (layers.files.as_slice(), layers.config.grace_s),
        ([named].as_slice(), 7)
    );
    // A file that is named must be there.
    world.sources.file = Some(world.folder.path().join("absent.toml"));
    let problems = world.problems();
    assert!(
        problems[0].contains("absent.toml") && problems[0].contains("hint:"),
        "{problems:?}"
    );
}

#[test]
fn variables_are_toml_or_plain_text() {
    let mut world = World::new();
    for (name, text) in [
        ("PIPIT_MODEL__PATH", "/models/1.gguf"),
        ("PIPIT_BROKER__USERNAME", "123"),
        ("PIPIT_REPLY__PREFIXES", r#"["reply/", "other/"]"#),
        ("PIPIT_SAMPLING__TOP_P", "0.5"),
        ("PIPIT_SAMPLING__TEMPERATURE", "1"),
        ("PIPIT_ADAPTERS__HOME", "/models/home.gguf"),
        ("PIPIT_DEVICE", "true"),
        ("PIPIT_MODEL__N_CTX", ""),
        ("PIPIT_LOG", "debug"),
        ("PIPIT_TEST_MODEL", "x"),
        ("MODEL__N_CTX", "x"),
    ] {
        world.variable(name, text);
    }
    let config = world.read().config;
    assert_eq!(config.model.path, Some(PathBuf::from("/models/1.gguf")));
    assert_eq!(config.broker.username.as_deref(), Some("123"));
    assert_eq!(config.reply.prefixes, ["reply/", "other/"]);
    assert_eq!((config.sampling.top_p, config.sampling.temperature), (0.5, 1.0));
    assert_eq!(config.adapters["home"], PathBuf::from("/models/home.gguf"));
    assert_eq!((config.device.as_str(), config.model.n_ctx), ("true", 2048));
}

#[test]
fn the_short_name_of_the_broker_comes_before_the_long_one() {
    let mut world = World::new();
    world.variable("PIPIT_BROKER", "mqtt://short");
    world.variable("PIPIT_BROKER__URL", "mqtt://long");
    let layers = world.read();
    assert_eq!(layers.config.broker.url, "mqtt://short");
    assert_eq!(origin(&layers, "broker.url"), "variable PIPIT_BROKER");
}

#[test]
fn relative_paths_in_a_file_are_beside_it() {
    let mut world = World::new();
    world.file(
        "etc/config.toml",
        "state_dir = \"state\"\n[model]\npath = \"m.gguf\"\n[broker]\nca = \"/abs.pem\"\n[adapters]\na = \"sub/a.gguf\"",
    );
    let etc = world.folder.path().join("etc");
    let config = world.read().config;
    assert_eq!(config.model.path, Some(etc.join("m.gguf")));
    assert_eq!(config.state_dir, Some(etc.join("state")));
    assert_eq!(config.broker.ca, Some(PathBuf::from("/abs.pem")));
    assert_eq!(config.adapters["a"], etc.join("sub/a.gguf"));
    // Of a variable or a flag they are those of the process.
    world.variable("PIPIT_MODEL__PATH", "m.gguf");
    assert_eq!(world.read().config.model.path, Some(PathBuf::from("m.gguf")));
}

#[test]
fn every_problem_of_every_layer_is_named_with_its_place() {
    let mut world = World::new();
    let system = world.file(
        "etc/config.toml",
        "devise = \"a\"\n\n[model]\nnctx = 5\nn_ctx = \"x\"\nthreads = -1\n[brokr]\nurl = \"x\"\nca = \"y\"\n",
    );
    let drop_in = world.file(
        "etc/config.d/a.toml",
        "model = 3\n[limits]\nqueue = 99999999999999999999\n",
    );
    world.variable("PIPIT_MODEL__SLOT", "4");
    world.variable("PIPIT_MODEL__SLOTS", "many");
    world.sources.flags = vec![Setting::flag("--threads", "model.threads", -7)];
    let problems = world.problems();
    let (system, drop_in) = (system.display(), drop_in.display());
    let expected = [
        format!("{drop_in}:1: model: it is a section"),
        format!("{drop_in}:3: limits.queue: "),
        format!("{system}:1: unknown key `devise`; hint: did you mean `device`?"),
        format!("{system}:4: unknown key `model.nctx`; hint: did you mean `model.n_ctx`?"),
        format!(
            "{system}:5: model.n_ctx: invalid type: string \"x\", expected u32; hint: its default is 2048"
        ),
        format!("{system}:6: model.threads: "),
        format!("{system}:7: unknown key `brokr`; hint: did you mean `broker`?"),
        "variable PIPIT_MODEL__SLOT: unknown key `model.slot`; hint: did you mean `PIPIT_MODEL__SLOTS`?"
            .to_owned(),
        "variable PIPIT_MODEL__SLOTS: model.slots: ".to_owned(),
        "flag --threads: model.threads: ".to_owned(),
    ];
    assert_eq!(problems.len(), expected.len(), "{problems:#?}");
    for start in expected {
        let found = problems.iter().find(|problem| problem.starts_with(&start));
        assert!(
            found.is_some_and(|problem| problem.contains("hint:")),
            "{start}\n{problems:#?}"
        );
    }
}

#[test]
fn values_that_cannot_be_have_a_place_too() {
    let mut world = World::new();
    let path = world.file(
        "user/config.toml",
        "[broker]\nurl = \"mqtt://h\"\nkeep_alive_s = 1\n",
    );
    world.variable("PIPIT_DEVICE", "a b");
    world.sources.flags = vec![Setting::flag("--broker", "broker.url", "http://x")];
    let problems = world.problems();
    assert_eq!(problems.len(), 3, "{problems:?}");
    for start in [
        "variable PIPIT_DEVICE: device: `a b`".to_owned(),
        "flag --broker: broker.url: `http://x`".to_owned(),
        format!("{}:3: broker.keep_alive_s: ", path.display()),
    ] {
        assert!(
            problems.iter().any(|problem| problem.starts_with(&start)),
            "{start} {problems:?}"
        );
    }
}

#[test]
fn text_that_is_not_toml_is_refused_line_by_line() {
    let world = World::new();
    let path = world.file(
        "etc/config.toml",
        "root = \"a\"\nmodel = \n[broker]\nurl = mqtt://x\n",
    );
    let problems = world.problems();
    for line in [2, 4] {
        let start = format!("{}:{line}: not TOML: ", path.display());
        assert!(
            problems.iter().any(|problem| problem.starts_with(&start)),
            "{start} {problems:?}"
        );
    }
    world.file("etc/config.toml", "root = \"a\"\nroot = \"b\"\n");
    let problems = world.problems();
    assert!(
        problems[0].contains(":2: not TOML: duplicate key"),
        "{problems:?}"
    );
    fs::write(world.folder.path().join("etc/config.toml"), [0xff, 0xfe, 0x00]).unwrap();
    assert!(world.problems()[0].contains("cannot be read"));
}

#[test]
fn files_that_are_named_and_not_there_have_a_place() {
    let world = World::new();
    let path = world.file("etc/config.toml", "[adapters]\n\"my home\" = \"absent.gguf\"\n");
    let problems = world.read().check_files().unwrap_err().to_string();
    let start = format!("{}:2: adapters.my home: ", path.display());
    assert!(problems.starts_with(&start), "{problems}");
}

#[test]
fn what_is_shown_means_the_same_when_it_is_read() {
    let mut world = World::new();
    world.file(
        "etc/config.toml",
        "[adapters]\n\"my home\" = \"/a\\\"b.gguf\"\n[sampling]\ntop_p = 0.7\n[reply]\nprefixes = [\"a/\", \"b/\"]\n",
    );
    world.variable("PIPIT_BROKER__USERNAME", "line\nbreak # and more");
    let layers = world.read();
    for with_origin in [false, true] {
        let text = layers.to_toml(with_origin);
        let again: Config = toml::from_str(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
        assert_eq!(again, layers.config, "{text}");
    }
    let again: Config = serde_json::from_value(layers.to_json(false)).unwrap();
    assert_eq!(again, layers.config);
    let json = layers.to_json(true);
    assert_eq!(json["sampling"]["top_p"]["value"], 0.7);
    assert_eq!(json["sampling"]["top_p"]["origin"]["line"], 4);
    assert_eq!(json["model"]["path"]["value"], serde_json::Value::Null);
    assert_eq!(json["model"]["path"]["origin"]["kind"], "default");
}

proptest::proptest! {
    /// Whatever stands in a file or a variable becomes a configuration or problems.
    #[test]
    fn garbage_never_panics(
        text in r#"(\[?(model|broker|adapters|"a b"|\.)?\]?(\n|\.)?(n_ctx|url|x|path)? ?= ?(1|-9e99|nan|"é|\[|\{a=1\}|"x"|1979-05-27)?\n?){0,6}"#,
        value in proptest::prelude::any::<String>(),
    ) {
        let mut world = World::new();
        world.file("etc/config.toml", &text);
        world.variable("PIPIT_MODEL__N_CTX", &value);
        world.variable("PIPIT_ADAPTERS__X", &value);
        if let Ok(layers) = Layers::read(&world.sources) {
            layers.to_toml(true).parse::<toml::Table>().unwrap();
        }
        // Without the variables, so that some texts get further.
        world.sources.variables.clear();
        if let Ok(layers) = Layers::read(&world.sources) {
            layers.to_toml(true).parse::<toml::Table>().unwrap();
        }
    }
}
