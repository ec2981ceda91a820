//! The thread that owns the journal's file while the daemon runs.
//!
//! In: batches of records, each with a ticket. Out: [`Committed`] for every ticket, when its records are on the
//! disk or could not be put there. All batches that wait while the disk works go into the next write together
//! (group commit): one fdatasync serves them all, and no timer adds latency.

use std::sync::mpsc::{Receiver, Sender, channel};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::{Journal, JournalError, Record};

/// The fate of one batch.
#[derive(Debug)]
pub struct Committed {
    /// The batch's ticket.
    pub ticket: u64,
    /// Why it is not on the disk.
    pub error: Option<String>,
    /// Bytes of the file now.
    pub file_bytes: u64,
}

enum Order {
    /// Write; sync before answering when `sync`.
    Append {
        ticket: u64,
        records: Vec<Record>,
        sync: bool,
    },
    Compact {
        ticket: Option<u64>,
        records: Vec<Record>,
    },
}

/// Sends batches to the thread. The thread ends, with everything written, when this is dropped.
#[derive(Debug)]
pub struct Writer {
    orders: Option<Sender<Order>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Writer {
    /// Starts the thread. The daemon reads the commits from the second half; their number is bounded by the
    /// batches that were sent.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(journal: Journal) -> std::io::Result<(Self, UnboundedReceiver<Committed>)> {
        let (orders, inbox) = channel();
        let (commits, committed) = unbounded_channel();
        let thread = std::thread::Builder::new()
            .name("journal".to_owned())
            .spawn(move || run(journal, &inbox, &commits))?;
        Ok((
            Self {
                orders: Some(orders),
                thread: Some(thread),
            },
            committed,
        ))
    }

    /// Appends records; a [`Committed`] with `ticket` follows. Without `sync` they may wait for the next sync:
    /// for what may be lost in a power cut without harm.
    pub fn append(&self, ticket: u64, records: Vec<Record>, sync: bool) {
        self.send(Order::Append {
            ticket,
            records,
            sync,
        });
    }

    /// Replaces the whole file.
    pub fn compact(&self, records: Vec<Record>) {
        self.send(Order::Compact {
            ticket: None,
            records,
        });
    }

    /// Replaces the whole file; a [`Committed`] with `ticket` follows.
    pub fn compact_and_tell(&self, ticket: u64, records: Vec<Record>) {
        self.send(Order::Compact {
            ticket: Some(ticket),
            records,
        });
    }

    fn send(&self, order: Order) {
        if let Some(orders) = &self.orders {
            // The thread lives as long as `orders` does.
            let _ = orders.send(order);
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(mut journal: Journal, inbox: &Receiver<Order>, commits: &UnboundedSender<Committed>) {
    while let Ok(first) = inbox.recv() {
        let mut waiting: Vec<(u64, Option<String>)> = Vec::new();
        let mut sync = false;
        for order in std::iter::once(first).chain(std::iter::from_fn(|| inbox.try_recv().ok())) {
            match order {
                Order::Append {
                    ticket,
                    records,
                    sync: wanted,
                } => {
                    sync |= wanted;
                    let error = journal.append(&records).err().map(|error| error.to_string());
                    waiting.push((ticket, error));
                }
                Order::Compact { ticket, records } => {
                    let error = journal.compact(&records).err().map(|error| error.to_string());
                    match ticket {
                        Some(ticket) => waiting.push((ticket, error)),
                        None => error.iter().for_each(|error| tracing::warn!("{error}")),
                    }
                }
            }
        }
        let failed = if sync {
            journal.sync().err().map(|error: JournalError| error.to_string())
        } else {
            None
        };
        for (ticket, error) in waiting {
            let error = error.or_else(|| failed.clone());
            let _ = commits.send(Committed {
                ticket,
                error,
                file_bytes: journal.bytes(),
            });
        }
    }
    if let Err(error) = journal.sync() {
        tracing::warn!("{error}");
    }
}
