//! Work: accepted requests go to the worker, and what it says comes back.
//!
//! In: the queue, events of the worker. Out: frames for the worker, chunks, answers. When a worker ends, whatever it
//! was doing is done again by the next one, a limited number of times.

use std::time::{Duration, Instant};

use super::{AHEAD, MOST_ATTEMPTS, Running, Service};
use crate::clock::unix_ms;
use crate::engine::{Finished, FromWorker, Job, ToWorker};
use crate::journal::Key;
use crate::journal::table::Stage;
use crate::queue::{Next, Waiting};
use crate::reply::{self, Spent, Stream};
use crate::transcript;
use crate::wire::{ErrorCode, Request};
use crate::worker::Event as WorkerEvent;

impl Service {
    /// Gives the worker what it can take.
    pub(super) fn dispatch(&mut self) {
        self.give_work();
        self.begin_work();
    }

    /// The oldest ones have the worker's slots; what it has ahead of that only waits there.
    fn begin_work(&mut self) {
        let mut jobs: Vec<u64> = self.running.keys().copied().collect();
        jobs.sort_unstable();
        for job in jobs.iter().take(self.config.model.slots as usize) {
            if let Some(running) = self.running.get_mut(job) {
                running.began.get_or_insert_with(Instant::now);
            }
        }
    }

    fn give_work(&mut self) {
        if self.asleep
            && !self.queue.is_empty()
            && !self.begins_no_more()
            && !self.models.hold()
            && self.erasing.is_none()
        {
            self.asleep = false;
            self.worker.wake();
        }
        if self.models.hold() || self.erasing.is_some() {
            return;
        }
        let most = self.config.model.slots as usize + AHEAD;
        while self.loaded && self.hashed && !self.begins_no_more() && self.running.len() < most {
            let waiting = match self.queue.pop(Instant::now()) {
                None => return,
                Some(Next::Expired(waiting)) => {
                    self.fail(
                        &waiting.key,
                        ErrorCode::Expired,
                        "the deadline passed before the work began",
                    );
                    continue;
                }
                Some(Next::Run(waiting)) => waiting,
            };
            let Some(Stage::Accepted(request)) = self.table.stage(&waiting.key) else {
                continue;
            };
            let request = request.clone();
            let job = self.number();
            let frame = ToWorker::Run {
                job,
                request: Box::new(self.job(&request, waiting.deadline)),
            };
            if !self.worker.send(frame) {
                self.queue.push(waiting, request.priority);
                return;
            }
            let running = Running {
                stream: Stream::of(&request),
                key: waiting.key,
                client: waiting.client,
                request,
                since: waiting.since,
                began: None,
                cancelled: false,
                late: false,
                energy_j: self.meter.is_some().then_some(0.0),
            };
            self.measure_energy();
            self.running.insert(job, running);
        }
    }

    /// The daemon ends, and no other member of the pool can do what it has taken from there.
    fn begins_no_more(&self) -> bool {
        self.draining && !self.owes_pool()
    }

    fn job(&self, request: &Request, deadline: Option<Instant>) -> Job {
        let defaults = &self.config.sampling;
        let sampling = &request.sampling;
        Job {
            messages: request.messages.clone(),
            max_tokens: request.max_tokens,
            stop: request.stop.clone(),
            schema: request.schema.clone(),
            adapter: request.adapter.clone(),
            stream: request.stream && !request.reply.plain,
            deadline_ms: deadline.map(|deadline| {
                let left = deadline.saturating_duration_since(Instant::now());
                u64::try_from(left.as_millis()).unwrap_or(u64::MAX)
            }),
            sampling: pipit_sampler::Settings {
                temperature: sampling.temperature.unwrap_or(defaults.temperature),
                top_p: sampling.top_p.unwrap_or(defaults.top_p),
                top_k: sampling.top_k.unwrap_or(defaults.top_k),
                min_p: sampling.min_p.unwrap_or(defaults.min_p),
                repeat_penalty: sampling.repeat_penalty.unwrap_or(defaults.repeat_penalty),
                frequency_penalty: sampling.frequency_penalty.unwrap_or(defaults.frequency_penalty),
                presence_penalty: sampling.presence_penalty.unwrap_or(defaults.presence_penalty),
                repeat_last_n: sampling.repeat_last_n.unwrap_or(defaults.repeat_last_n),
                seed: sampling.seed,
            },
        }
    }

    /// Something happened in the worker.
    pub fn worker(&mut self, event: WorkerEvent) {
        match event {
            WorkerEvent::Started(pid) => {
                self.worker_pid = Some(pid);
                self.model_starts();
                self.announce();
            }
            WorkerEvent::Ended { status } => self.worker_ended(&status),
            WorkerEvent::Asleep => {
                self.worker_made_way();
                self.go_on_erasing();
                // Something may have come in the meantime.
                self.dispatch();
            }
            WorkerEvent::Changed => self.worker_made_way(),
            WorkerEvent::Frame(frame) => self.frame(frame),
        }
    }

    fn frame(&mut self, frame: FromWorker) {
        self.heard = Instant::now();
        match frame {
            FromWorker::Ready(info) => {
                tracing::info!(
                    "model {} is loaded: {} {}, context {}, {} threads, {} ms",
                    info.name,
                    info.architecture,
                    info.quantisation,
                    info.context,
                    info.threads,
                    info.load_ms
                );
                self.author.model = info;
                self.model_loaded();
                self.loaded = true;
                self.unloadable = None;
                self.asleep = false;
                self.active = Instant::now();
                self.identify();
                self.ease();
                self.publish_card();
                self.announce();
                self.dispatch();
            }
            FromWorker::Unloadable { message } => {
                if self.give_up_model(&message, true) {
                    return;
                }
                if self.unloadable.as_ref() != Some(&message) {
                    tracing::error!("{message}");
                    self.unloadable = Some(message);
                }
                self.announce();
            }
            FromWorker::Delta { job, text } => {
                if let Some(stream) = self
                    .running
                    .get_mut(&job)
                    .and_then(|running| running.stream.as_mut())
                {
                    stream.push(&text);
                }
                self.chunks();
            }
            FromWorker::Done { job, finished } => {
                self.measure_energy();
                if let Some(running) = self.running.remove(&job) {
                    self.finish(running, &finished);
                }
                self.dispatch();
            }
            FromWorker::Failed { job, code, message } => {
                if let Some(running) = self.running.remove(&job) {
                    match running.late {
                        true => self.fail_late(&running.key),
                        false => self.fail(&running.key, code, &message),
                    }
                }
                self.dispatch();
            }
            FromWorker::Heartbeat => {}
        }
    }

    /// Shares what was drawn since the last reading among the requests under way, in equal parts. Those that wait in the
    /// worker for a slot, which takes them in order, have no part in it.
    pub(super) fn measure_energy(&mut self) {
        let Some(meter) = &mut self.meter else { return };
        let joules = meter.read(Instant::now());
        self.counters.power_w = meter.watts();
        if let Some(joules) = joules {
            *self.counters.energy_j.get_or_insert(0.0) += joules;
        }
        let mut jobs: Vec<u64> = self.running.keys().copied().collect();
        jobs.sort_unstable();
        jobs.truncate(self.config.model.slots as usize);
        let share = joules.map(|joules| joules / jobs.len() as f64);
        for job in jobs {
            if let Some(running) = self.running.get_mut(&job) {
                // With a part of it unknown, the whole is.
                running.energy_j = running.energy_j.zip(share).map(|(sum, share)| sum + share);
            }
        }
    }

    /// Ends what the engine has worked on for longer than it may.
    pub(super) fn end_late_work(&mut self) {
        let most = Duration::from_secs(self.config.limits.seconds);
        if most.is_zero() {
            return;
        }
        for (&job, running) in &mut self.running {
            if !running.late && running.began.is_some_and(|began| began.elapsed() > most) {
                running.late = true;
                self.worker.send(ToWorker::Cancel { job });
            }
        }
    }

    fn fail_late(&mut self, key: &Key) {
        let why = format!("the work took longer than {} s", self.config.limits.seconds);
        self.fail(key, ErrorCode::Expired, &why);
    }

    /// Tells the worker whose the model is, once both are known.
    pub(super) fn identify(&mut self) {
        if self.loaded && self.hashed {
            let sha256 = self.author.sha256.clone();
            self.worker.send(ToWorker::Identity { sha256 });
        }
    }

    /// Tells the worker what to do against heat.
    pub(super) fn ease(&mut self) {
        if self.loaded {
            let step = self.thermal.step().unwrap_or_default();
            self.worker.send(ToWorker::Ease { step });
        }
    }

    /// Unloads the model when nobody has asked for long enough.
    pub(super) fn sleep_when_idle(&mut self) {
        let patience = Duration::from_secs(self.config.model.idle_unload_s);
        let busy = !self.running.is_empty() || !self.queue.is_empty() || !self.accepting.is_empty();
        if busy {
            self.active = Instant::now();
        } else if self.loaded && !patience.is_zero() && self.active.elapsed() >= patience {
            tracing::info!("no request for {} s: the model is unloaded", patience.as_secs());
            self.loaded = false;
            self.asleep = true;
            self.worker.sleep();
        }
    }

    fn worker_ended(&mut self, status: &str) {
        self.worker_pid = None;
        self.loaded = false;
        if self.unloadable.is_none() {
            self.counters.worker_ends += 1;
            tracing::warn!("the worker ended ({status}); starting another");
            self.give_up_model(status, false);
        }
        let lost: Vec<Running> = self.running.drain().map(|(_, running)| running).collect();
        for running in lost {
            if running.late {
                self.fail_late(&running.key);
                continue;
            }
            if running.cancelled {
                self.fail(&running.key, ErrorCode::Cancelled, "cancelled");
                continue;
            }
            let attempts = self.attempts.entry(running.key.clone()).or_insert(0);
            *attempts += 1;
            if *attempts >= MOST_ATTEMPTS {
                let message = format!("the engine failed {attempts} times on this request ({status})");
                self.fail(&running.key, ErrorCode::Internal, &message);
                continue;
            }
            // Its work had begun in time: the deadline is met.
            let waiting = Waiting {
                key: running.key,
                client: running.client,
                since: running.since,
                deadline: None,
            };
            self.queue
                .push(waiting, running.request.priority.saturating_add(1000));
        }
        self.announce();
    }

    fn finish(&mut self, running: Running, finished: &Finished) {
        self.counters.answered += 1;
        self.prove_model();
        let computed = finished.prompt_tokens - finished.cached_tokens + finished.completion_tokens;
        self.queue.charge(&running.client, computed);
        self.counters.cached_tokens += u64::from(finished.cached_tokens);
        self.counters.prompt_tokens += u64::from(finished.prompt_tokens);
        self.counters.completion_tokens += u64::from(finished.completion_tokens);
        if finished.predicted_ms > 0.0 {
            self.counters.tokens_per_second =
                f64::from(finished.completion_tokens) * 1000.0 / finished.predicted_ms;
        }
        let began = running.began.unwrap_or_else(Instant::now);
        let queue_ms = (began - running.since).as_secs_f64() * 1000.0;
        if let Some(joules) = running.energy_j {
            self.counters.answers_j += joules;
            self.counters.answers_j_tokens += u64::from(finished.completion_tokens);
        }
        let spent = Spent {
            queue_ms,
            energy_j: running.energy_j,
        };
        let mut answer = reply::completion(&self.author, &running.request, finished, spent);
        answer.fingerprint.clone_from(&running.request.fingerprint);
        tracing::info!(
            id = running.request.id,
            prompt_tokens = finished.prompt_tokens,
            completion_tokens = finished.completion_tokens,
            ms = (finished.prompt_ms + finished.predicted_ms).round(),
            "answered"
        );
        self.keep_content(&running, &answer.body);
        self.done(running.key, answer);
    }

    /// Keeps what was said, where the owner wants it.
    fn keep_content(&self, running: &Running, answer: &str) {
        if !self.transcript.is_on() {
            return;
        }
        let line = transcript::Line {
            at: unix_ms(),
            id: running.request.id.clone(),
            client: running.client.clone(),
            messages: running.request.messages.clone(),
            answer: answer.to_owned(),
        };
        if let Err(error) = self.transcript.write(&line) {
            tracing::warn!("transcript: {error}");
        }
    }

    pub(super) fn fail(&mut self, key: &Key, code: ErrorCode, message: &str) {
        let Some(Stage::Accepted(request)) = self.table.stage(key) else {
            return;
        };
        self.counters.errors += 1;
        let mut answer = reply::error(&request.reply, &request.id, code, message);
        answer.fingerprint.clone_from(&request.fingerprint);
        tracing::info!(id = request.id, code = code.as_str(), "not answered: {message}");
        self.done(key.clone(), answer);
    }
}
