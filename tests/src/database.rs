//! A PostgreSQL of the test's own: a cluster in a temporary folder, run by the user `postgres` where the test is root,
//! because PostgreSQL does not run as root.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::broker::free_port;
use crate::process::{self, Running};

const SOON: Duration = Duration::from_secs(60);
const USER: &str = "pipit";

/// A running server; it ends with this value.
#[derive(Debug)]
pub struct Database {
    process: Option<Running>,
    folder: TempDir,
    programs: PathBuf,
    port: u16,
}

impl Database {
    /// Makes a cluster whose only user has a password, and starts it.
    ///
    /// # Errors
    /// When PostgreSQL is not installed or does not start.
    pub fn start() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
        let mut database = Self {
            process: None,
            folder,
            programs: programs()?,
            port: free_port()?,
        };
        let data = database.data();
        let mut words = vec![
            "install".to_owned(),
            "-d".to_owned(),
            "-m".to_owned(),
            "700".to_owned(),
        ];
        if is_root()? {
            words.extend(["-o".to_owned(), "postgres".to_owned()]);
        }
        words.push(data.display().to_string());
        run(&words)?;
        fs::write(database.folder.path().join("password"), "secret\n")?;
        let pass = database.pass_file();
        fs::write(&pass, format!("127.0.0.1:{}:*:{USER}:secret\n", database.port))?;
        fs::set_permissions(&pass, fs::Permissions::from_mode(0o600))?;
        let mut words = database.as_owner("initdb")?;
        let password = database.folder.path().join("password");
        words.extend(["-D".to_owned(), data.display().to_string()]);
        words.extend([
            "-U".to_owned(),
            USER.to_owned(),
            "-A".to_owned(),
            "scram-sha-256".to_owned(),
        ]);
        words.extend([
            "--pwfile".to_owned(),
            password.display().to_string(),
            "--no-sync".to_owned(),
        ]);
        run(&words)?;
        database.restart()?;
        Ok(database)
    }

    /// Ends it at once, as a power cut would.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill(&mut self) -> Result<()> {
        self.process.take().context("the database does not run")?.kill()?;
        Ok(())
    }

    /// Starts it again after [`Database::kill`].
    ///
    /// # Errors
    /// When it does not start.
    pub fn restart(&mut self) -> Result<()> {
        let mut words = self.as_owner("postgres")?;
        words.extend(["-D".to_owned(), self.data().display().to_string()]);
        words.extend(["-p".to_owned(), self.port.to_string()]);
        for setting in ["listen_addresses=127.0.0.1", "unix_socket_directories="] {
            words.extend(["-c".to_owned(), setting.to_owned()]);
        }
        let process = Running::start(Command::new(&words[0]).args(&words[1..]))?;
        process.wait_for_line(SOON, |line| line.contains("ready to accept connections"))?;
        self.process = Some(process);
        Ok(())
    }

    /// Its folder of data.
    pub fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// Its address, without the password.
    pub fn url(&self) -> String {
        format!("postgres://{USER}@127.0.0.1:{}/postgres", self.port)
    }

    /// The file with the password, for `PGPASSFILE`.
    pub fn pass_file(&self) -> PathBuf {
        self.folder.path().join("pgpass")
    }

    /// What psql says to a statement: rows on lines, columns between `|`.
    ///
    /// # Errors
    /// When the statement fails.
    pub fn query(&self, statement: &str) -> Result<String> {
        let mut command = Command::new(self.programs.join("psql"));
        command.env("PGPASSFILE", self.pass_file()).args([
            "-d",
            &self.url(),
            "-w",
            "-At",
            "-v",
            "ON_ERROR_STOP=1",
            "-c",
            statement,
        ]);
        let said = Running::start(&mut command)?.finish(SOON)?.success()?;
        Ok(said.trim_end().to_owned())
    }

    /// One of its programs, to be run by who owns the data. The process is the program itself, so that it can be killed.
    fn as_owner(&self, program: &str) -> Result<Vec<String>> {
        let program = self.programs.join(program).display().to_string();
        let mut words = Vec::new();
        if is_root()? {
            let owner = [
                "setpriv",
                "--reuid=postgres",
                "--regid=postgres",
                "--clear-groups",
            ];
            words.extend(owner.map(str::to_owned));
        }
        words.push(program);
        Ok(words)
    }
}

fn run(words: &[String]) -> Result<String> {
    process::run(&words[0], &words[1..], SOON)?.success()
}

fn is_root() -> Result<bool> {
    Ok(process::run("id", ["-u"], SOON)?.stdout.trim() == "0")
}

/// The folder of PostgreSQL's programs, of the newest version that is installed.
fn programs() -> Result<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|version| Some(version.ok()?.path().join("bin")))
        .filter(|folder| folder.join("initdb").is_file())
        .collect();
    found.sort();
    let on_path = std::env::var_os("PATH")
        .and_then(|path| std::env::split_paths(&path).find(|folder| Path::is_file(&folder.join("initdb"))));
    found
        .pop()
        .or(on_path)
        .context("PostgreSQL is not there\n  hint: scripts/install-packages --tests")
}
