//! A full disk: what cannot be written down is refused at once, what was promised is answered when there is room.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use pipit_tests::broker::Broker;
use pipit_tests::client::Client;
use pipit_tests::device::{Device, Options, PATIENCE};
use pipit_tests::model::Tiny;
use pipit_tests::process;

const CONFIG: &str = "[model]\nthreads = 1\n[metrics]\ninterval_s = 1\n";

/// How the disk is made full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    /// The state folder is a file system of its own, of 256 KiB.
    SmallDisk,
    /// Where this user may mount nothing: files may not grow. A write fails all the same, with EFBIG for ENOSPC.
    SmallFiles,
}

impl Method {
    fn find() -> Self {
        if process::may_mount() {
            Self::SmallDisk
        } else {
            Self::SmallFiles
        }
    }

    fn options(self) -> Options {
        let (before, under) = match self {
            Self::SmallDisk => (
                "mount -t tmpfs -o size=256k none \"$STATE\" || exit 99",
                &process::OWN_MOUNTS[..],
            ),
            Self::SmallFiles => ("trap '' XFSZ", &[][..]),
        };
        Options {
            config: CONFIG.to_owned(),
            before: before.to_owned(),
            under: under.iter().map(ToString::to_string).collect(),
        }
    }

    fn fill(self, device: &Device) -> Result<()> {
        match self {
            Self::SmallDisk => {
                let mut filler = File::create(Self::filler(device)?)?;
                // Until there is no room for a single page.
                while filler.write_all(&[0; 4096]).is_ok() {}
                Ok(())
            }
            Self::SmallFiles => {
                let bytes = std::fs::metadata(device.state().join("journal"))?.len();
                Self::limit(device, &format!("{bytes}:"))
            }
        }
    }

    fn free(self, device: &Device) -> Result<()> {
        match self {
            Self::SmallDisk => Ok(std::fs::remove_file(Self::filler(device)?)?),
            Self::SmallFiles => Self::limit(device, "unlimited:"),
        }
    }

    fn filler(device: &Device) -> Result<PathBuf> {
        Ok(seen_by(device)?.join("filler"))
    }

    fn limit(device: &Device, size: &str) -> Result<()> {
        let id = device.id()?.to_string();
        let arguments = ["--pid", &id, &format!("--fsize={size}")];
        process::run("prlimit", arguments, Duration::from_secs(10))?.success()?;
        Ok(())
    }
}

/// The state folder as the daemon sees it: a mount of its own is seen through its process.
fn seen_by(device: &Device) -> Result<PathBuf> {
    let state = device.state();
    Ok(Path::new(&format!("/proc/{}/root", device.id()?)).join(state.strip_prefix("/")?))
}

#[test]
fn a_full_disk_refuses_at_once_and_keeps_every_promise() -> Result<()> {
    let method = Method::find();
    println!("the disk is made full by {method:?}");
    let model = Tiny::make()?;
    let broker = Broker::forgetful()?;
    let mut device = Device::new("full", &model.path(), method.options())?;
    let (answers, metrics) = (device.topic("res/#"), device.topic("metrics"));
    let client = Client::connect(broker.port(), "client", &[&answers, &metrics])?;
    device.restart(&broker)?;
    let counter = |name: &'static str, least: u64| {
        client.wait(PATIENCE, name, |seen| {
            seen.json(&metrics)[name]
                .as_u64()
                .is_some_and(|count| count >= least)
        })
    };

    // Promised while there was room.
    let worker = device.worker()?;
    process::signal("STOP", worker)?;
    client.ask("promised", device.request("promised", "Say something long.", 400));
    counter("accepted", 1)?;

    method.fill(&device)?;
    let asked = Instant::now();
    // The first of them may still fit into the last page.
    for number in 0..40 {
        let id = format!("refused{number}");
        client.ask(&id, device.request(&id, "No room for this one.", 4));
    }
    client.wait(PATIENCE, "refusals", |seen| {
        seen.answers
            .values()
            .flatten()
            .any(|answer| answer.id == "refused39")
    })?;
    let took = asked.elapsed();
    let refused = client.see(|seen| {
        let errors = seen
            .answers
            .values()
            .flatten()
            .filter_map(|answer| answer.error.clone());
        errors.collect::<Vec<String>>()
    });
    println!("{} of 40 refused after {took:?}", refused.len());
    ensure!(refused.iter().all(|code| code == "queue_full"), "{refused:?}");
    ensure!(refused.len() >= 20, "most do not fit: {}", refused.len());
    ensure!(took < Duration::from_secs(5), "at once, not after {took:?}");

    // The engine has answered it, the journal could not take the answer: it does not go out, because a crash now
    // would be followed by another one.
    process::signal("CONT", worker)?;
    counter("answered", 1)?;
    ensure!(client.see(|seen| !seen.answers.contains_key("promised")));

    method.free(&device)?;
    client.wait_answered(PATIENCE)?;
    client.ask("after", device.request("after", "There is room again.", 4));
    client.wait_answered(PATIENCE)?;
    client.check_promise()?;
    for id in ["promised", "after"] {
        ensure!(
            client.see(|seen| seen.answers[id][0].error.is_none()),
            "{id} has an answer"
        );
    }
    // And no request that was refused is found, and run, at the next start.
    let journal = std::fs::read(seen_by(&device)?.join("journal"))?;
    let journal = String::from_utf8_lossy(&journal);
    ensure!(journal.contains("\"promised\""));
    client.see(|seen| {
        for answer in seen
            .answers
            .values()
            .flatten()
            .filter(|answer| answer.error.is_some())
        {
            ensure!(
                !journal.contains(&format!("\"{}\"", answer.id)),
                "{} is in the journal",
                answer.id
            );
        }
        Ok(())
    })
}
