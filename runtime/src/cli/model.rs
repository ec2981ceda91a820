//! `pipit model`: installed models.

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use pipit::config::{Config, Layers, Setting, Sources};
use pipit::engine::Settings;
use pipit::plan::mebibytes;
use pipit::store::canary::Trial;
use pipit::store::install::{self, Installed, Progress, World};
use pipit::store::pack::{self, Pack};
use pipit::store::{Source, Store, StoreError};
use serde_json::json;

use super::code;

const EXAMPLES: &str = "\
Examples:
  pipit model pack model.gguf -o smart-home --name smart-home --version 3 --golden 'Turn on the light'
  minisign -Sm smart-home/manifest.json
  pipit model install smart-home
  pipit model install https://models.example.org/smart-home/manifest.json
  pipit model list
  pipit model rollback

A model is a folder with manifest.json, its signature manifest.json.minisig and the files that it names. It is fetched,
verified, tried, and then served, also by a daemon that runs. The model before is kept.

Exit codes: 0 done, 1 failed, 3 not signed by a trusted key, damaged, or not taken after it was tried, 78 bad configuration";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Fetch, verify and try a model, and serve it
    Install {
        /// Folder, manifest.json, .gguf file, or URL of a manifest.json
        source: String,
        /// Take it without a signature
        #[arg(long)]
        allow_unsigned: bool,
        #[command(flatten)]
        common: Common,
    },
    /// Show what is installed
    List {
        #[command(flatten)]
        common: Common,
    },
    /// Check signature and sha256 of a source, or of what is installed
    Verify {
        /// Folder, manifest.json, or URL; without it, everything that is installed
        source: Option<String>,
        #[command(flatten)]
        common: Common,
    },
    /// Serve an installed model
    Activate {
        /// Its id
        model: String,
        #[command(flatten)]
        common: Common,
    },
    /// Serve the model before again
    Rollback {
        #[command(flatten)]
        common: Common,
    },
    /// Make a folder with a manifest, to be signed
    Pack(PackArgs),
}

#[derive(Debug, clap::Args)]
struct Common {
    /// TOML file to read in place of /etc/pipit and the user's own
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Folder of the state [default: $STATE_DIRECTORY, $XDG_STATE_HOME/pipit, ~/.local/state/pipit]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<String>,
    /// Print one object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct PackArgs {
    /// GGUF file
    model: PathBuf,
    /// Folder to write
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// Name of the model, A-Z a-z 0-9 _ . -
    #[arg(long)]
    name: String,
    /// Its version
    #[arg(long)]
    version: String,
    /// SPDX expression of its licence
    #[arg(long)]
    license: Option<String>,
    /// LoRA adapter (GGUF), trained on this very model
    #[arg(long, value_name = "NAME=FILE")]
    adapter: Vec<String>,
    /// A prompt: its answer is computed now, and every device must give the same one before it serves the model
    #[arg(long, value_name = "PROMPT")]
    golden: Vec<String>,
    /// Print the manifest
    #[arg(long)]
    json: bool,
}

impl Common {
    fn config(&self, allow_unsigned: bool) -> anyhow::Result<Config> {
        let state = self.state_dir.clone();
        let state = state.map(|dir| Setting::flag("--state-dir", "state_dir", dir));
        let unsigned =
            allow_unsigned.then(|| Setting::flag("--allow-unsigned", "install.allow_unsigned", true));
        Ok(Layers::read(&Sources {
            file: self.config.clone(),
            flags: state.into_iter().chain(unsigned).collect(),
            ..Sources::of_process()
        })?
        .config)
    }
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    match done(args) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) => match error.downcast_ref::<StoreError>() {
            Some(wrong) if wrong.is_verification() => {
                eprintln!("error: {wrong}");
                Ok(ExitCode::from(code::VERIFICATION))
            }
            Some(StoreError::Config(_) | StoreError::Plan(_)) => {
                eprintln!("error: {error}");
                Ok(ExitCode::from(code::CONFIG))
            }
            _ => Err(error),
        },
    }
}

fn done(args: &Args) -> anyhow::Result<()> {
    match &args.verb {
        Verb::Install {
            source,
            allow_unsigned,
            common,
        } => {
            let source = Source::parse(source)?;
            change(
                &common.config(*allow_unsigned)?,
                common.json,
                |world, progress| install::install(&source, world, progress),
            )
        }
        Verb::Activate { model, common } => change(&common.config(false)?, common.json, |world, progress| {
            install::activate(model, world, progress)
        }),
        Verb::Rollback { common } => change(&common.config(false)?, common.json, |world, _| {
            install::roll_back(&Store::of(world.state), None)
        }),
        Verb::List { common } => list(common),
        Verb::Verify { source, common } => verify(source.as_deref(), common),
        Verb::Pack(args) => pack(args),
    }
}

fn change(
    config: &Config,
    json: bool,
    act: impl FnOnce(&World<'_>, &mut dyn FnMut(Progress)) -> Result<Installed, StoreError>,
) -> anyhow::Result<()> {
    let state = config.state_dir()?;
    std::fs::create_dir_all(&state).with_context(|| state.display().to_string())?;
    let world = World {
        config,
        state: &state,
        program: std::env::current_exe()?,
    };
    let installed = act(&world, &mut show)?;
    if json {
        println!("{}", serde_json::to_string(&installed)?);
    } else {
        let how = if installed.unchanged {
            "was served already"
        } else {
            "is served"
        };
        println!("{} {how}", installed.model);
        if let Some(previous) = &installed.previous {
            println!("before it: {previous}");
        }
    }
    if let Some(path) = &config.model.path {
        eprintln!(
            "note: the configuration names {}, which is served in place of an installed model; hint: remove [model] path",
            path.display()
        );
    }
    Ok(())
}

/// Progress, on a terminal only.
fn show(progress: Progress) {
    let mut out = std::io::stderr();
    if !out.is_terminal() {
        return;
    }
    let line = match progress {
        Progress::Fetch { file, bytes, of } => {
            format!("{file}: {} of {}", mebibytes(bytes), mebibytes(of))
        }
        Progress::Room => "the daemon unloads its model: both do not fit into the memory".to_owned(),
        Progress::Canary => "the model is tried".to_owned(),
    };
    let _ = write!(out, "\r\x1b[K{line}\r");
}

fn list(common: &Common) -> anyhow::Result<()> {
    let listing = Store::of(&common.config(false)?.state_dir()?).listing();
    if common.json {
        println!("{listing}");
        return Ok(());
    }
    let models = listing["models"].as_array().map_or(&[][..], Vec::as_slice);
    for model in models {
        let mark = match (model["active"] == true, model["previous"] == true) {
            (true, _) => "*",
            (_, true) => "<",
            _ => " ",
        };
        println!(
            "{mark} {}  version {}, {}",
            model["model"].as_str().unwrap_or_default(),
            model["version"].as_str().unwrap_or_default(),
            mebibytes(model["bytes"].as_u64().unwrap_or_default())
        );
    }
    if models.is_empty() {
        println!("nothing is installed; hint: pipit model install");
    } else {
        println!("(* is served, < was before it)");
    }
    if let Some(why) = listing["given_up"]["why"].as_str() {
        println!(
            "given up: {}: {why}",
            listing["given_up"]["id"].as_str().unwrap_or_default()
        );
    }
    Ok(())
}

fn verify(source: Option<&str>, common: &Common) -> anyhow::Result<()> {
    let config = common.config(false)?;
    let store = Store::of(&config.state_dir()?);
    let names = match source {
        Some(source) => {
            let source = Source::parse(source)?;
            let (manifest, signed) = install::verified(&source, &config)?;
            for file in manifest.files() {
                source.check(&file)?;
            }
            vec![manifest.id(&signed.bytes)]
        }
        None => store.verify(&config)?,
    };
    if common.json {
        println!("{}", json!({ "verified": names }));
    } else {
        names.iter().for_each(|name| println!("{name}: good"));
    }
    Ok(())
}

fn pack(args: &PackArgs) -> anyhow::Result<()> {
    let mut adapters = Vec::new();
    for adapter in &args.adapter {
        let (name, file) = adapter
            .split_once('=')
            .with_context(|| format!("--adapter {adapter}: it is not NAME=FILE"))?;
        adapters.push((name.to_owned(), PathBuf::from(file)));
    }
    let trial = Trial {
        program: std::env::current_exe()?,
        settings: Settings::alone(std::path::absolute(&args.model)?, 2048, 0, "f16"),
        hang: Duration::from_secs(120),
    };
    let pack = Pack {
        model: args.model.clone(),
        adapters,
        name: args.name.clone(),
        version: args.version.clone(),
        license: args.license.clone(),
        golden: args.golden.clone(),
    };
    let manifest = pack::pack(&pack, (!args.golden.is_empty()).then_some(&trial), &args.out)?;
    if args.json {
        println!("{}", serde_json::to_string(&manifest)?);
    } else {
        let path = args.out.join("manifest.json");
        println!("{}", path.display());
        eprintln!("hint: minisign -Sm {}", path.display());
    }
    Ok(())
}
