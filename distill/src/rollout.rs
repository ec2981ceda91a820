//! Answers of a model to several prompts at once, token by token, with a key-value cache: the most probable ones, or
//! drawn ones.

mod draw;
mod llama_cpp;
mod student;

use std::collections::VecDeque;

use candle_core::Result;
pub use draw::Draw;
pub use llama_cpp::{DecodeError, LlamaCpp};
pub use student::Student;

use crate::data::Prompt;
use crate::model::Model;
use crate::random::Random;

/// When an answer ends.
#[derive(Debug, Clone)]
pub struct Stop<'a> {
    /// Tokens that end an answer.
    pub eos: &'a [u32],
    /// The most tokens of an answer, its end token among them.
    pub max_new_tokens: usize,
}

impl<'a> Stop<'a> {
    /// At most `wanted` tokens, and no more than fit behind the longest of the prompts into a model that knows
    /// `longest` positions.
    pub fn within(eos: &'a [u32], wanted: usize, longest: usize, prompts: &[Prompt]) -> Self {
        let prompt = prompts.iter().map(|prompt| prompt.ids.len()).max().unwrap_or(0);
        Self {
            eos,
            max_new_tokens: wanted.min(longest.saturating_sub(prompt)),
        }
    }
}

/// A model that goes on with several sequences at once. Its open sequences have an order.
pub trait Decode {
    /// What can go wrong.
    type Error;

    /// The most tokens of a sequence.
    fn longest(&self) -> usize;
    /// The number of logits of a token.
    fn vocab_size(&self) -> usize;
    /// Of so many places, those that should be free before prompts are opened while others go on, at least 1.
    fn worth_opening(&self, width: usize) -> usize;
    /// Opens every prompt `copies` times, behind the sequences that are open, the copies of one prompt one after another.
    /// The logits behind each prompt, `[prompts, vocab_size]`.
    fn open(&mut self, prompts: &[&[u32]], copies: usize) -> std::result::Result<Vec<f32>, Self::Error>;
    /// Closes the sequences for which `keep` is false; the others move up.
    fn retain(&mut self, keep: &[bool]) -> std::result::Result<(), Self::Error>;
    /// Goes on with one token of every open sequence. The logits behind them, `[sequences, vocab_size]`.
    fn next(&mut self, tokens: &[u32]) -> std::result::Result<Vec<f32>, Self::Error>;
}

/// An answer that a model has drawn.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Rollout {
    /// Its tokens, the end token among them where it came to one.
    pub ids: Vec<u32>,
    /// The natural logarithm of each token's probability when it was drawn: at the temperature of the drawing, before
    /// unlikely tokens were ruled out.
    pub logprobs: Vec<f32>,
}

/// How rollouts are made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RolloutOptions {
    /// How tokens are drawn.
    pub draw: Draw,
    /// Answers to each prompt, at least 1.
    pub num_generations: usize,
    /// Sequences that are open at one time; all answers to one prompt begin together, even where they are more.
    pub width: usize,
}

/// `num_generations` answers to each prompt, in the order of the prompts, the answers to one prompt one after another.
/// `streams` are the random numbers of each answer. A prompt must have at least one token.
pub fn rollouts<D: Decode>(
    decoder: &mut D,
    prompts: &[&[u32]],
    options: &RolloutOptions,
    stop: &Stop<'_>,
    streams: &mut [Random],
) -> std::result::Result<Vec<Rollout>, D::Error> {
    let copies = options.num_generations;
    assert_eq!(
        streams.len(),
        prompts.len() * copies,
        "every answer has its random numbers"
    );
    let (vocab_size, longest) = (decoder.vocab_size(), decoder.longest());
    let room = |answer: usize| {
        let prompt = prompts[answer / copies].len();
        stop.max_new_tokens.min(longest.saturating_sub(prompt))
    };
    let mut answers = vec![Rollout::default(); streams.len()];
    let mut waiting: VecDeque<usize> = (0..prompts.len()).filter(|i| room(i * copies) > 0).collect();
    // The answers that are not done, in the order of the decoder's sequences, and the logits behind each.
    let mut open: Vec<usize> = Vec::new();
    let mut logits: Vec<f32> = Vec::new();
    loop {
        let free = options.width.saturating_sub(open.len());
        let count = match open.is_empty() {
            true => (free / copies).max(1),
            false if free < decoder.worth_opening(options.width) => 0,
            false => free / copies,
        };
        if count > 0 && !waiting.is_empty() {
            let new: Vec<usize> = waiting.drain(..count.min(waiting.len())).collect();
            let ids: Vec<&[u32]> = new.iter().map(|i| prompts[*i]).collect();
            let behind = decoder.open(&ids, copies)?;
            for (prompt, row) in new.iter().zip(behind.chunks_exact(vocab_size)) {
                open.extend(prompt * copies..(prompt + 1) * copies);
                (0..copies).for_each(|_| logits.extend_from_slice(row));
            }
        }
        if open.is_empty() {
            return Ok(answers);
        }
        let drawn = options.draw.tokens(&logits, vocab_size, &open, streams);
        let mut keep = Vec::with_capacity(open.len());
        for (answer, (token, logprob)) in open.iter().zip(&drawn) {
            let rollout = &mut answers[*answer];
            rollout.ids.push(*token);
            rollout.logprobs.push(*logprob);
            keep.push(!stop.eos.contains(token) && rollout.ids.len() < room(*answer));
        }
        decoder.retain(&keep)?;
        let mut kept = keep.iter();
        open.retain(|_| *kept.next().unwrap_or(&false));
        let tokens: Vec<u32> = drawn
            .iter()
            .zip(&keep)
            .filter(|(_, keep)| **keep)
            .map(|((token, _), _)| *token)
            .collect();
        logits = match tokens.is_empty() {
            true => Vec::new(),
            false => decoder.next(&tokens)?,
        };
    }
}

/// The most probable answer to each prompt, without its end token. A prompt must have at least one token.
pub fn greedy(model: &Model, prompts: &[&[u32]], stop: &Stop<'_>) -> Result<Vec<Vec<u32>>> {
    let options = RolloutOptions {
        draw: Draw::GREEDY,
        num_generations: 1,
        width: prompts.len(),
    };
    // The most probable token needs no random numbers.
    let mut streams = vec![Random::new(0, "greedy"); prompts.len()];
    let answers = rollouts(&mut Student::new(model)?, prompts, &options, stop, &mut streams)?;
    let text = |mut ids: Vec<u32>| {
        ids.pop_if(|last| stop.eos.contains(last));
        ids
    };
    Ok(answers.into_iter().map(|answer| text(answer.ids)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts up from a prompt's last token, and ends at 9; a prompt that ends with an even token is sure, the others
    /// waver between the next token and the one after.
    struct Counter {
        last: Vec<u32>,
        most_open: usize,
        prompts_together: Vec<usize>,
    }

    impl Counter {
        fn new() -> Self {
            Self {
                last: vec![],
                most_open: 0,
                prompts_together: vec![],
            }
        }

        fn logits(tokens: &[u32]) -> Vec<f32> {
            let row = |token: u32| {
                let mut row = vec![-30.0f32; 11];
                row[(token as usize + 1).min(9)] = 3.0;
                if token % 2 == 1 {
                    row[(token as usize + 2).min(9)] = 3.0;
                }
                row
            };
            tokens.iter().flat_map(|token| row(*token)).collect()
        }
    }

    impl Decode for Counter {
        type Error = std::convert::Infallible;
        fn longest(&self) -> usize {
            8
        }
        fn vocab_size(&self) -> usize {
            11
        }
        fn worth_opening(&self, width: usize) -> usize {
            width.div_ceil(2)
        }
        fn open(&mut self, prompts: &[&[u32]], copies: usize) -> std::result::Result<Vec<f32>, Self::Error> {
            let last: Vec<u32> = prompts.iter().map(|ids| ids[ids.len() - 1]).collect();
            self.last
                .extend(last.iter().flat_map(|token| vec![*token; copies]));
            self.most_open = self.most_open.max(self.last.len());
            self.prompts_together.push(prompts.len());
            Ok(Self::logits(&last))
        }
        fn retain(&mut self, keep: &[bool]) -> std::result::Result<(), Self::Error> {
            let mut keep = keep.iter();
            self.last.retain(|_| *keep.next().unwrap());
            Ok(())
        }
        fn next(&mut self, tokens: &[u32]) -> std::result::Result<Vec<f32>, Self::Error> {
            assert_eq!(tokens.len(), self.last.len());
            self.last = tokens.to_vec();
            Ok(Self::logits(tokens))
        }
    }

    fn run(decoder: &mut Counter, prompts: &[&[u32]], copies: usize, width: usize) -> Vec<Rollout> {
        let options = RolloutOptions {
            draw: Draw {
                temperature: 1.0,
                top_k: 0,
                top_p: 1.0,
            },
            num_generations: copies,
            width,
        };
        let stop = Stop {
            eos: &[9, 10],
            max_new_tokens: 6,
        };
        let mut streams: Vec<Random> = (0..prompts.len() * copies)
            .map(|answer| Random::new(3, &format!("answer {answer}")))
            .collect();
        rollouts(decoder, prompts, &options, &stop, &mut streams).unwrap()
    }

    #[test]
    fn the_end_token_is_kept_and_nothing_follows_it() {
        let mut decoder = Counter::new();
        let answers = run(&mut decoder, &[&[8], &[7]], 3, 100);
        assert_eq!(answers[0].ids, [9]);
        for answer in &answers {
            assert_eq!(answer.ids.iter().filter(|id| **id == 9).count(), 1);
            assert_eq!(answer.ids.last(), Some(&9));
            assert_eq!(answer.ids.len(), answer.logprobs.len());
        }
        // One of two tokens that are as likely.
        assert!(
            answers[3..]
                .iter()
                .any(|answer| (answer.logprobs[0] - 0.5f32.ln()).abs() < 1e-3)
        );
        assert_eq!((decoder.prompts_together, decoder.most_open), (vec![2], 6));
    }

    #[test]
    fn answers_stop_where_there_is_no_room() {
        let answers = run(&mut Counter::new(), &[&[0], &[1; 5], &[0; 8]], 1, 100);
        assert!(answers[0].ids.len() <= 6);
        assert!(answers[1].ids.len() <= 3);
        assert!(answers[2].ids.is_empty());
    }

    #[test]
    fn answers_do_not_depend_on_how_many_are_open() {
        let prompts: Vec<Vec<u32>> = (0..9).map(|i| vec![i % 4, 1]).collect();
        let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let together = run(&mut Counter::new(), &prompts, 2, 100);
        for width in [1, 2, 4, 7] {
            let mut decoder = Counter::new();
            assert_eq!(run(&mut decoder, &prompts, 2, width), together, "{width}");
            assert!(decoder.most_open <= width.max(2));
        }
    }
}
