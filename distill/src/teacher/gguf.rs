//! A teacher in a GGUF file, of any architecture that llama.cpp knows.

use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pipit_convert::evaluate::{MIN_CTX, Options, Session, Unobserved};

use super::{Asked, LogitRows, Scores, Teacher, TeacherError, label_places};

/// The model in llama.cpp. It computes when logits are read, in the order in which they are read: no more of them exist
/// than were asked for.
#[derive(Debug)]
pub struct GgufTeacher {
    decoder: Arc<Mutex<Decoder>>,
    name: String,
    vocab_size: usize,
    longest: usize,
    calls: usize,
}

impl GgufTeacher {
    /// Loads the file. Sequences may have `longest` tokens, which is what memory is kept for.
    pub fn open(path: &Path, longest: usize) -> Result<Self, TeacherError> {
        let options = Options {
            ctx: longest.max(MIN_CTX),
            ..Options::default()
        };
        let session = Session::open(path, &options, Unobserved)?;
        Ok(Self {
            name: path.display().to_string(),
            vocab_size: session.vocabulary(),
            longest,
            calls: 0,
            decoder: Arc::new(Mutex::new(Decoder { session, at: None })),
        })
    }
}

impl Teacher for GgufTeacher {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn score(&mut self, sequences: &[Asked<'_>]) -> Result<Scores, TeacherError> {
        let mut rows = Vec::new();
        for (i, asked) in sequences.iter().enumerate() {
            asked.check_length(self.longest, || self.name())?;
            rows.extend(label_places(asked.labels).map(|label| (i, label - 1)));
        }
        let tokens = |asked: &Asked<'_>| asked.ids.iter().map(|id| id.cast_signed()).collect();
        self.calls += 1;
        Ok(Scores::Full(Box::new(DecodedRows {
            decoder: self.decoder.clone(),
            call: self.calls,
            sequences: sequences.iter().map(tokens).collect(),
            rows,
            vocab_size: self.vocab_size,
        })))
    }
}

/// The model, and which tokens stand in its cache.
#[derive(Debug)]
struct Decoder {
    session: Session<Unobserved>,
    /// The call, the sequence, and how many of its tokens.
    at: Option<(usize, usize, usize)>,
}

impl Decoder {
    /// The logits after the tokens in these places (ascending) of a sequence.
    fn logits(
        &mut self,
        (call, sequence): (usize, usize),
        tokens: &[i32],
        places: &[usize],
        out: &mut [f32],
    ) -> Result<(), TeacherError> {
        let (Some(first), Some(last)) = (places.first(), places.last()) else {
            return Ok(());
        };
        let mut from = match self.at {
            Some((of_call, of_sequence, from))
                if (of_call, of_sequence) == (call, sequence) && from <= *first =>
            {
                from
            }
            _ => {
                self.session.clear();
                0
            }
        };
        // What an error leaves in the cache is not known.
        self.at = None;
        let mut out = out.chunks_exact_mut(self.session.vocabulary());
        while from <= *last {
            let to = (from + self.session.batch()).min(last + 1);
            self.session
                .decode(&tokens[from..to], |i| places.binary_search(&(from + i)).is_ok())?;
            let logits = self.session.logits()?.chunks_exact(self.session.vocabulary());
            for (row, out) in logits.zip(&mut out) {
                out.copy_from_slice(row);
            }
            from = to;
        }
        self.at = Some((call, sequence, from));
        Ok(())
    }
}

/// Logits that are computed when they are read.
#[derive(Debug)]
struct DecodedRows {
    decoder: Arc<Mutex<Decoder>>,
    call: usize,
    sequences: Vec<Vec<i32>>,
    /// The sequence, and the token after which the logits are asked for.
    rows: Vec<(usize, usize)>,
    vocab_size: usize,
}

impl LogitRows for DecodedRows {
    fn rows(&self) -> usize {
        self.rows.len()
    }

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn read(&self, rows: Range<usize>, out: &mut [f32]) -> candle_core::Result<()> {
        let mut decoder: MutexGuard<'_, Decoder> =
            self.decoder.lock().unwrap_or_else(PoisonError::into_inner);
        let mut out = out;
        for of_one in self.rows[rows].chunk_by(|a, b| a.0 == b.0) {
            let sequence = of_one[0].0;
            let places: Vec<usize> = of_one.iter().map(|(_, place)| *place).collect();
            let (now, later) = out.split_at_mut(places.len() * self.vocab_size);
            decoder
                .logits((self.call, sequence), &self.sequences[sequence], &places, now)
                .map_err(candle_core::Error::wrap)?;
            out = later;
        }
        Ok(())
    }
}
