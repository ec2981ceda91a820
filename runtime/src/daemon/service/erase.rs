//! Erasure: what one client or one request has left behind goes, and the administrator gets a report.
//!
//! In: `cmd/erase`. Out: a journal that was written anew without it, no kept beginnings of prompts (in memory and on the
//! disk: nobody can say whose they are, so all go, by way of a new worker), transcripts without its lines, and a broker
//! that retains no message on the topics where people write to the device. The command is acknowledged when all of that is
//! done, so that a power cut only delays it.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{OnCommit, OnDelivery, Service};
use crate::engine::ToWorker;
use crate::journal::table::Stage;
use crate::journal::{Key, Record};
use crate::mqtt::{Ack, Delivery};
use crate::wire::Reply;
use crate::wire::command::Erase;

/// What was erased.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Report {
    /// Requests and answers of the journal, those among them that waited or were under way.
    pub(super) entries: u64,
    /// Requests that were not answered yet, and will not be.
    pub(super) unanswered: u64,
    /// Lines of transcripts.
    pub(super) content_lines: u64,
    /// Files of kept beginnings of prompts, everybody's.
    pub(super) prefix_files: u64,
    /// Topics of the device on which the broker retains nothing now: a request that was sent as a retained message would
    /// stay there.
    pub(super) retained_topics: u64,
    /// What could not be done.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub(super) problems: Vec<String>,
}

/// An erasure that is under way.
pub(super) struct Erasing {
    pub(super) id: String,
    pub(super) reply: Reply,
    ack: Option<Ack>,
    report: Report,
    since: Instant,
    journal_done: bool,
    worker_done: bool,
    /// Empty messages that wait for their PUBACK, by topic.
    emptying: HashMap<u64, String>,
}

impl Service {
    /// Begins.
    pub(super) fn erase(&mut self, id: String, reply: Reply, wanted: &Erase, ack: Option<Ack>) {
        let prefixes = self.config.reply.prefixes.clone();
        let topics = self.topics.clone();
        let is_wanted = |client: &str, request: &str| match (&wanted.client, &wanted.request) {
            (Some(name), _) => name == client,
            (None, Some(name)) => name == request,
            (None, None) => false,
        };
        let entries = self.table.entries().filter(|(key, _)| {
            is_wanted(&topics.client(&key.0, &prefixes), &key.1) || wanted.client.as_ref() == Some(&key.0)
        });
        let keys: Vec<(Key, bool)> = entries
            .map(|(key, entry)| (key.clone(), matches!(entry.stage, Stage::Accepted(_))))
            .collect();
        let mut report = Report {
            entries: keys.len() as u64,
            unanswered: keys.iter().filter(|(_, open)| *open).count() as u64,
            ..Report::default()
        };
        for (key, _) in &keys {
            self.forget(key);
            self.askers.erased(key);
        }
        let held = self.erase_held(|key| {
            is_wanted(&topics.client(&key.0, &prefixes), &key.1) || wanted.client.as_ref() == Some(&key.0)
        });
        report.entries += held;
        report.unanswered += held;
        match self.transcript.erase(|line| is_wanted(&line.client, &line.id)) {
            Ok(lines) => report.content_lines = lines,
            Err(error) => report.problems.push(format!("transcripts: {error}")),
        }
        let records = keys.into_iter().map(|(key, _)| Record::Erased { key }).collect();
        let ticket = self.record(records, true);
        self.on_commit.insert(ticket, OnCommit::Nothing);
        // Without the old file's bytes.
        let ticket = self.number();
        self.writer.compact_and_tell(ticket, self.table.records());
        self.on_commit.insert(ticket, OnCommit::Erased);
        self.erasing = Some(Erasing {
            id,
            reply,
            ack,
            report,
            since: Instant::now(),
            journal_done: false,
            worker_done: false,
            emptying: HashMap::new(),
        });
        self.empty_retained();
        self.go_on_erasing();
    }

    /// An empty retained message removes what the broker retains. It is not known whose that is, so all goes.
    fn empty_retained(&mut self) {
        let mut topics = vec![self.topics.request()];
        topics.extend(self.tasks.keys().map(|name| self.topics.task(name)));
        for topic in topics {
            let token = self.remove_retained(topic.clone(), OnDelivery::Emptied);
            let Some(erasing) = &mut self.erasing else { return };
            match token {
                Some(token) => {
                    erasing.emptying.insert(token, topic);
                }
                None => erasing
                    .report
                    .problems
                    .push(format!("{topic}: the link has no room")),
            }
        }
    }

    /// The broker has said what becomes of an empty message.
    pub(super) fn emptied(&mut self, token: u64, delivery: &Delivery) {
        if let Some(erasing) = &mut self.erasing
            && let Some(topic) = erasing.emptying.remove(&token)
        {
            match delivery {
                Delivery::Refused(why) => erasing.report.problems.push(format!("{topic}: {why}")),
                Delivery::Taken | Delivery::Unheard => erasing.report.retained_topics += 1,
            }
        }
        self.go_on_erasing();
    }

    /// Nothing of it stays in memory.
    pub(super) fn forget(&mut self, key: &Key) {
        if let Some((&job, _)) = self.running.iter().find(|(_, running)| running.key == *key) {
            self.worker.send(ToWorker::Cancel { job });
            // Its end concerns nobody: not the one either who asks the same again.
            self.running.remove(&job);
        }
        self.queue.cancel(key);
        self.attempts.remove(key);
        self.accepting.remove(key);
        self.unwritten.retain(|(other, _)| other != key);
        for answer in std::mem::take(&mut self.unpublished) {
            match answer.key == *key {
                true => self.ack(answer.ack),
                false => self.unpublished.push_back(answer),
            }
        }
        self.table.apply(Record::Erased { key: key.clone() });
    }

    /// The journal was written anew, or was not.
    pub(super) fn journal_erased(&mut self, error: Option<&String>) {
        if let Some(erasing) = &mut self.erasing {
            erasing.journal_done = true;
            erasing
                .report
                .problems
                .extend(error.map(|error| format!("journal: {error}")));
        }
        self.go_on_erasing();
    }

    /// The worker's memory and the files of kept beginnings go together: when no worker runs.
    pub(super) fn go_on_erasing(&mut self) {
        let grace = Duration::from_secs(self.config.grace_s);
        let Some(erasing) = &mut self.erasing else { return };
        if !erasing.worker_done {
            if self.asleep && self.worker_pid.is_none() {
                let folder = self.state_folder.join("prefix");
                match remove_files(&folder) {
                    Ok(files) => erasing.report.prefix_files = files,
                    Err(error) => erasing
                        .report
                        .problems
                        .push(format!("{}: {error}", folder.display())),
                }
                erasing.worker_done = true;
            } else if self.loaded && (self.running.is_empty() || erasing.since.elapsed() > grace) {
                self.loaded = false;
                self.asleep = true;
                self.worker.sleep();
                return;
            } else if self.unloadable.is_some() {
                // No worker holds anything.
                erasing.report.prefix_files = remove_files(&self.state_folder.join("prefix")).unwrap_or(0);
                erasing.worker_done = true;
            }
        }
        if !(erasing.worker_done && erasing.journal_done && erasing.emptying.is_empty()) {
            return;
        }
        let Some(erasing) = self.erasing.take() else {
            return;
        };
        tracing::info!(
            id = erasing.id,
            entries = erasing.report.entries,
            prefix_files = erasing.report.prefix_files,
            "erased"
        );
        let result = serde_json::to_value(&erasing.report).unwrap_or_default();
        let body = Self::command_body(&erasing.id, "erase", result);
        self.say(erasing.reply, body);
        self.ack(erasing.ack);
        if self.asleep && self.config.model.idle_unload_s == 0 {
            self.asleep = false;
            self.worker.wake();
        }
        self.dispatch();
    }
}

fn remove_files(folder: &Path) -> std::io::Result<u64> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    let mut removed = 0;
    for entry in entries {
        std::fs::remove_file(entry?.path())?;
        removed += 1;
    }
    std::fs::File::open(folder)?.sync_all()?;
    Ok(removed)
}
