//! A slot: one request on its way through the model.
//!
//! It holds the tokens of prompt and answer so far. As many of them as it has cells have been computed; the others are
//! pending: the whole prompt at first, then one sampled token, or a few that a schema forces. So prefill, decode and
//! the work that is done again after a slot had to give up its cells are one and the same: compute what is pending,
//! then choose the next token from the last one's logits.

use std::time::{Duration, Instant};

use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_2::token::data::LlamaTokenData;
use pipit_sampler::Sampler;

use super::constraint::Constraint;
use super::output::Output;
use super::pool::Cells;
use super::{Finished, Job, JobError};

/// Between two pieces of a streamed answer; as the daemon publishes them.
const GATHER: Duration = Duration::from_millis(50);

/// How an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The model said so, a stop string came, or the schema is complete.
    Stop,
    /// `max_tokens`, or the end of the context.
    Length,
}

/// What a request becomes before it is let in.
#[derive(Debug)]
pub struct Prepared {
    /// Its prompt, at least one token.
    pub tokens: Vec<LlamaToken>,
    /// Where the system messages end, in tokens.
    pub beginning: usize,
    /// Most tokens of prompt and answer.
    pub longest: u32,
    /// The schema of its answer.
    pub constraint: Option<Constraint>,
}

/// One request.
#[derive(Debug)]
pub struct Slot {
    /// Its number at the daemon.
    pub job: u64,
    /// What was asked.
    pub request: Job,
    /// Order of arrival: the youngest gives way.
    pub order: u64,
    /// Its sequence in the context, while it has one.
    pub sequence: i32,
    /// One for each token that was computed.
    pub cells: Cells,
    /// Prompt and answer.
    pub tokens: Vec<LlamaToken>,
    /// The job whose beginning it shares, and how much of it, while that one still computes it.
    pub leader: Option<(u64, usize)>,
    /// Where the system messages end, in tokens.
    pub beginning: usize,
    /// Tokens of the prompt that were there already.
    pub cached: usize,
    /// Text that was not yet sent.
    pub fresh: String,
    /// When text was last sent.
    sent: Option<Instant>,
    /// When the work must have begun; `None` once it has.
    pub deadline: Option<Instant>,
    /// Set when nothing is left to compute.
    pub ended: Option<End>,
    prompt: usize,
    longest: usize,
    began: Instant,
    first: Option<Instant>,
    completion: u32,
    sampler: Sampler,
    constraint: Option<Constraint>,
    output: Output,
    text: String,
}

impl Slot {
    /// A request that is ready to be let in.
    pub fn new(job: u64, request: Job, order: u64, model: &LlamaModel, prompt: Prepared) -> Self {
        let Prepared {
            tokens,
            beginning,
            longest,
            constraint,
        } = prompt;
        let sampler = Sampler::new(&request.sampling, model.n_vocab(), longest, &tokens);
        let output = Output::new(&request.stop);
        let deadline = request.deadline_ms;
        let deadline = deadline.and_then(|most| Instant::now().checked_add(Duration::from_millis(most)));
        let mut slot = Self {
            deadline,
            job,
            request,
            order,
            sequence: -1,
            cells: Cells::new(),
            prompt: tokens.len(),
            tokens,
            leader: None,
            beginning,
            cached: 0,
            fresh: String::new(),
            sent: None,
            ended: None,
            longest: longest as usize,
            began: Instant::now(),
            first: None,
            completion: 0,
            sampler,
            constraint,
            output,
            text: String::new(),
        };
        slot.force(model);
        slot
    }

    /// Tokens to compute.
    pub fn pending(&self) -> usize {
        self.tokens.len() - self.cells.len()
    }

    /// Whether nothing of the answer was chosen yet.
    pub fn is_prefilling(&self) -> bool {
        self.first.is_none()
    }

    /// The work begins: what was waited for counts as waiting.
    pub fn begin(&mut self) {
        self.deadline = None;
        if self.first.is_none() {
            self.began = Instant::now();
        }
    }

    /// It has got cells of what was computed before.
    pub fn took(&mut self) {
        if self.is_prefilling() {
            self.cached = self.cached.max(self.cells.len());
        }
    }

    /// Chooses the next token from the logits after the last one that was pending; `candidates` is room to do it in.
    ///
    /// # Errors
    /// A schema that is stuck.
    pub fn advance(
        &mut self,
        model: &LlamaModel,
        logits: &[f32],
        candidates: &mut Vec<LlamaTokenData>,
    ) -> Result<(), JobError> {
        let allowed = self
            .constraint
            .as_mut()
            .map(Constraint::allowed)
            .transpose()
            .map_err(JobError::Schema)?;
        let token = self
            .sampler
            .next(logits, allowed.as_ref(), candidates)
            .ok_or_else(|| JobError::Schema("no token obeys the schema here".to_owned()))?;
        self.first.get_or_insert_with(Instant::now);
        if model.vocab().is_eog(token) {
            self.ended = Some(End::Stop);
            return Ok(());
        }
        if let Some(constraint) = &mut self.constraint {
            constraint.accept(token).map_err(JobError::Schema)?;
        }
        self.push(model, token);
        if self.output.stopped() {
            self.ended = Some(End::Stop);
            return Ok(());
        }
        self.force(model);
        if self.ended.is_none()
            && (self.completion >= self.request.max_tokens || self.tokens.len() >= self.longest)
        {
            self.ended = Some(End::Length);
            self.close()?;
        }
        Ok(())
    }

    /// The text that is to be sent now: the first at once, then what has gathered. Every message wakes the daemon, and it
    /// takes one of the cores that compute.
    pub fn due(&mut self, now: Instant) -> Option<String> {
        let rest = self.sent.is_some_and(|sent| now - sent < GATHER);
        if self.fresh.is_empty() || rest {
            return None;
        }
        self.sent = Some(now);
        Some(std::mem::take(&mut self.fresh))
    }

    /// The context is full, and nobody else can give way.
    ///
    /// # Errors
    /// A schema that cannot be closed.
    pub fn cut(&mut self) -> Result<(), JobError> {
        self.ended = Some(End::Length);
        self.close()
    }

    /// Ends the text.
    pub fn finish(&mut self) -> Finished {
        let rest = self.output.finish();
        self.say(&rest);
        let first = self.first.unwrap_or_else(Instant::now);
        Finished {
            text: std::mem::take(&mut self.text),
            finish_reason: match self.ended {
                Some(End::Length) => "length",
                _ => "stop",
            }
            .to_owned(),
            prompt_tokens: self.prompt as u32,
            cached_tokens: self.cached.min(self.prompt) as u32,
            completion_tokens: self.completion,
            prompt_ms: (first - self.began).as_secs_f64() * 1000.0,
            predicted_ms: first.elapsed().as_secs_f64() * 1000.0,
        }
    }

    /// Takes the tokens that the schema leaves no choice about.
    fn force(&mut self, model: &LlamaModel) {
        let Some(constraint) = &mut self.constraint else {
            return;
        };
        let forced = constraint.forced();
        let complete = constraint.is_complete();
        for token in forced {
            self.sampler.saw(token);
            self.push(model, token);
        }
        if complete {
            self.ended = Some(End::Stop);
        }
    }

    fn close(&mut self) -> Result<(), JobError> {
        if let Some(constraint) = &mut self.constraint {
            let closing = constraint.close().map_err(JobError::Schema)?;
            let text = self.output.push(&closing);
            self.say(&text);
        }
        Ok(())
    }

    fn push(&mut self, model: &LlamaModel, token: LlamaToken) {
        self.tokens.push(token);
        self.completion += 1;
        let text = self
            .output
            .push(&model.vocab().token_to_piece(token, false, None));
        self.say(&text);
    }

    fn say(&mut self, text: &str) {
        self.text.push_str(text);
        if self.request.stream {
            self.fresh.push_str(text);
        }
    }
}
