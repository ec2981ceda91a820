//! Models: the service changes to another installed model, and back when it does no good.
//!
//! In: the store's place file, starts and ends of the worker. Out: a worker with another model. Requests are taken all the
//! while: those under way are finished by the old model, the others wait for the new one.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::Service;
use crate::daemon::installer::{Installer, Order};
use crate::fault;
use crate::queue::Waiting;
use crate::store::place::{GivenUp, MOST_STARTS, Stamp};
use crate::store::{Served, Store};
use crate::worker;

/// A worker that has lived this long with its model is good.
const GOOD_AFTER: Duration = Duration::from_secs(60);

/// What the service knows about models.
pub struct Models {
    pub(super) store: Store,
    pub(super) installer: Installer,
    /// An order that is under way.
    pub(super) order: Option<Order>,
    state: PathBuf,
    /// How the worker was started; the part that depends on the model changes.
    options: worker::Options,
    served: Served,
    stamp: Stamp,
    /// The model to change to, and since when.
    next: Option<(Served, Instant)>,
    /// An installation needs the memory, since then.
    room: Option<Instant>,
    /// The model that is served has shown that it works.
    proven: bool,
    /// Starts in a row without that.
    starts: u32,
    loaded_at: Option<Instant>,
}

impl Models {
    /// With the model that the worker was started with.
    pub fn new(
        store: Store,
        installer: Installer,
        state: PathBuf,
        options: worker::Options,
        served: Served,
    ) -> Self {
        let place = store.place().unwrap_or_default();
        Self {
            stamp: store.stamp(),
            store,
            installer,
            order: None,
            state,
            options,
            proven: place.proven || served.id.is_none(),
            starts: place.starts,
            served,
            next: None,
            room: None,
            loaded_at: None,
        }
    }

    /// The state folder.
    pub(super) fn state(&self) -> &Path {
        &self.state
    }

    /// The id of the model that is served, where it is an installed one.
    pub(super) fn served_id(&self) -> Option<&str> {
        self.served.id.as_deref()
    }

    /// Whether the configuration names the file.
    pub(super) fn named_by_config(&self) -> bool {
        self.served.id.is_none()
    }

    /// Whether no new work may begin: the worker is about to end.
    pub(super) fn hold(&self) -> bool {
        self.next.is_some() || self.room.is_some()
    }
}

impl Service {
    /// What is to be done by the clock.
    pub(super) fn look_after_models(&mut self) {
        self.look_at_store();
        if self.models.served.id.is_none() {
            return;
        }
        if let Some(since) = self.models.loaded_at
            && since.elapsed() >= GOOD_AFTER
        {
            self.prove_model();
        }
        self.make_room();
        self.change_model();
    }

    /// Looks whether another model is the active one now.
    pub(super) fn look_at_store(&mut self) {
        let stamp = self.models.store.stamp();
        if self.models.served.id.is_none() || stamp == self.models.stamp {
            return;
        }
        self.models.stamp = stamp;
        let Some(place) = self.models.store.place() else {
            return;
        };
        if Some(&place.active) == self.models.served.id.as_ref() {
            self.models.next = None;
            return;
        }
        match Served::installed(&self.models.store, &place.active) {
            Ok(served) => self.models.next = Some((served, Instant::now())),
            Err(error) => tracing::error!("{error}"),
        }
    }

    /// Starts the worker with the next model, when the work of the old one is done or has taken too long.
    fn change_model(&mut self) {
        let grace = Duration::from_secs(self.config.grace_s);
        let ready = |since: &Instant| self.running.is_empty() || since.elapsed() > grace;
        if !self.models.next.as_ref().is_some_and(|(_, since)| ready(since)) {
            return;
        }
        let Some((served, _)) = self.models.next.clone() else {
            return;
        };
        let options = served.plan(&self.config).and_then(|(_, plan)| {
            let settings = served.settings(&self.config, &self.models.state);
            let settings =
                settings.map_err(|source| crate::store::StoreError::io(&self.models.state, source))?;
            Ok(worker::Options {
                settings,
                plan,
                ..self.models.options.clone()
            })
        });
        let options = match options {
            Ok(options) => options,
            Err(error) => {
                self.models.next = None;
                tracing::error!("{error}");
                return;
            }
        };
        if !self.worker.change(options) {
            return;
        }
        fault::passed(fault::Point::ModelChanging);
        let id = served.id.clone().unwrap_or_default();
        tracing::info!("changing to the model {id}");
        let place = self.models.store.place().unwrap_or_default();
        self.models.next = None;
        self.models.proven = place.proven;
        self.models.starts = place.starts;
        self.models.loaded_at = None;
        self.loaded = false;
        self.asleep = false;
        self.unloadable = None;
        self.hashed = served.sha256.is_some();
        self.author.sha256 = served.sha256.clone().unwrap_or_default();
        self.adapters = served.adapters.keys().cloned().collect();
        self.models.served = served;
        self.announce();
    }

    /// The worker has ended because it was told to: what it did not finish is done again by the next.
    pub(super) fn worker_made_way(&mut self) {
        self.worker_pid = None;
        self.loaded = false;
        for (_, running) in self.running.drain() {
            let priority = running.request.priority.saturating_add(1000);
            // Its work had begun in time: the deadline is met.
            let waiting = Waiting {
                key: running.key,
                client: running.client,
                since: running.since,
                deadline: None,
            };
            self.queue.push(waiting, priority);
        }
        self.announce();
    }

    /// Unloads the model while an installation needs its memory.
    fn make_room(&mut self) {
        let wanted = self.models.store.room_is_wanted();
        if wanted && self.models.room.is_none() {
            tracing::info!("the model is unloaded: an installation needs the memory");
        }
        let since = self.models.room.unwrap_or_else(Instant::now);
        self.models.room = wanted.then_some(since);
        let grace = Duration::from_secs(self.config.grace_s);
        if wanted && self.loaded && (self.running.is_empty() || since.elapsed() > grace) {
            self.loaded = false;
            self.asleep = true;
            self.worker.sleep();
            self.announce();
        } else if !wanted && self.asleep && self.config.model.idle_unload_s == 0 && self.models.next.is_none()
        {
            self.asleep = false;
            self.worker.wake();
        }
    }

    /// A worker was started.
    pub(super) fn model_starts(&mut self) {
        self.models.starts += 1;
        self.models.loaded_at = None;
        if self.models.proven {
            return;
        }
        // Written down, because it may take the whole machine with it.
        let starts = self.models.starts;
        self.write_place(|place| place.starts = starts);
    }

    /// Whether the file of an installed model is not what its manifest says. It is not served then.
    pub(super) fn damaged(&mut self, sha256: &str) -> bool {
        let served = &self.models.served;
        if served.sha256.as_deref().is_none_or(|expected| expected == sha256) {
            return false;
        }
        let why = format!("{} is damaged; hint: install it again", served.path.display());
        self.models.proven = false;
        if !self.give_up_model(&why, true) {
            tracing::error!("{why}");
            self.unloadable = Some(why);
            self.announce();
        }
        true
    }

    /// The model is loaded.
    pub(super) fn model_loaded(&mut self) {
        self.models.loaded_at = Some(Instant::now());
    }

    /// The model works: it has answered, or lived for a while.
    pub(super) fn prove_model(&mut self) {
        self.models.starts = 0;
        self.models.loaded_at = None;
        if self.models.proven {
            return;
        }
        self.models.proven = true;
        self.write_place(|place| {
            place.proven = true;
            place.starts = 0;
        });
    }

    /// A worker has ended or could not load: back to the model before, when this one does no good. Returns whether that
    /// is under way.
    pub(super) fn give_up_model(&mut self, why: &str, at_once: bool) -> bool {
        if self.models.next.is_some() {
            return true;
        }
        let hopeless = at_once && !self.models.proven || self.models.starts >= MOST_STARTS;
        let Some(id) = self.models.served.id.clone().filter(|_| hopeless) else {
            return false;
        };
        let given_up = GivenUp {
            id: id.clone(),
            why: why.to_owned(),
        };
        let changed = self.models.store.change(|place| {
            let mut place = place.rolled_back()?;
            place.previous = None;
            // It has served before.
            place.proven = true;
            place.given_up = Some(given_up);
            Ok(place)
        });
        match changed {
            Ok(place) => {
                tracing::error!("the model {id} is given up ({why}): back to {}", place.active);
                self.look_at_store();
                self.models.next.is_some()
            }
            Err(_) => false,
        }
    }

    fn write_place(&mut self, change: impl FnOnce(&mut crate::store::Place)) {
        let id = self.models.served.id.clone().unwrap_or_default();
        let written = self.models.store.change(|mut place| {
            if place.active == id {
                change(&mut place);
            }
            Ok(place)
        });
        match written {
            Ok(place) if place.active == id => self.models.stamp = self.models.store.stamp(),
            // Somebody has activated another one in the meantime: the stamp says so.
            Ok(_) => {}
            Err(error) => tracing::warn!("{error}"),
        }
    }
}
