//! Scores on disk: what a teacher has said of a text once, it need not say again, to this student or to another one with
//! the same tokenizer.
//!
//! A folder holds `cache.json`, which says whose scores they are, and one file for each sequence, named by the sha256
//! of its tokens and labels. A file is Zstandard with a checksum; in it stand the places' k most probable tokens and
//! their log p, unrounded, byte by byte in planes because the high bytes of neighbours are alike. All other tokens
//! together have the rest of the probability.

use std::io;
use std::path::{Path, PathBuf};

use pipit_convert::output::write_file;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{Asked, LogitRows, Scores, Teacher, TeacherError, TopK, label_places};

const ABOUT: &str = "cache.json";
const FORMAT: &str = "pipit teacher scores 1";
const MAGIC: &[u8; 8] = b"PIPITSC1";
/// Zstandard's level: higher ones take longer and gain little on these bytes.
const LEVEL: i32 = 3;
/// Rows of logits that are brought down to the top k at once.
const ROWS: usize = 64;

/// Whose scores a folder holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Binding {
    /// The teacher, by its name and what else tells it apart.
    pub teacher: String,
    /// [`Encoder::tokenizer_sha256`](crate::data::Encoder::tokenizer_sha256).
    pub tokenizer_sha256: String,
    /// [`Encoder::template_sha256`](crate::data::Encoder::template_sha256).
    pub template_sha256: String,
    /// The student's tokens.
    pub vocab_size: usize,
    /// Tokens of a place.
    pub top_k: usize,
}

#[derive(Debug, Serialize, Deserialize)]
struct About {
    format: String,
    #[serde(flatten)]
    binding: Binding,
}

impl Binding {
    /// The first thing in which two differ: what, here, there.
    fn difference(&self, other: &Self) -> Option<(&'static str, String, String)> {
        let pairs = [
            ("teacher", self.teacher.clone(), other.teacher.clone()),
            (
                "tokenizer",
                self.tokenizer_sha256.clone(),
                other.tokenizer_sha256.clone(),
            ),
            (
                "chat template",
                self.template_sha256.clone(),
                other.template_sha256.clone(),
            ),
            (
                "vocabulary size",
                self.vocab_size.to_string(),
                other.vocab_size.to_string(),
            ),
            ("top k", self.top_k.to_string(), other.top_k.to_string()),
        ];
        pairs.into_iter().find(|(_, ours, theirs)| ours != theirs)
    }
}

/// How often a cache had what was asked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Sequences that stood in it.
    pub found: usize,
    /// Sequences that the teacher was asked about.
    pub asked: usize,
    /// Files that could not be used, and were written anew.
    pub damaged: usize,
}

/// A teacher that is asked about what its cache does not have.
pub struct Cached<'a> {
    teacher: Box<dyn Teacher + 'a>,
    dir: PathBuf,
    top_k: usize,
    vocab_size: usize,
    counts: Counts,
}

impl<'a> Cached<'a> {
    /// Opens the folder, or makes it. One that holds the scores of another teacher, tokenizer, template or k is refused.
    pub fn open(dir: &Path, teacher: Box<dyn Teacher + 'a>, binding: &Binding) -> Result<Self, TeacherError> {
        let about = dir.join(ABOUT);
        if about.is_file() {
            let no = |why: String| TeacherError::NoCache {
                path: dir.to_path_buf(),
                why,
            };
            let bytes = std::fs::read(&about).map_err(|e| failed(&about, e))?;
            let there: About = serde_json::from_slice(&bytes).map_err(|e| no(format!("{ABOUT}: {e}")))?;
            if there.format != FORMAT {
                return Err(no(format!("its format is {:?}, not {FORMAT:?}", there.format)));
            }
            if let Some((what, wanted, found)) = binding.difference(&there.binding) {
                return Err(TeacherError::ForeignCache {
                    path: dir.to_path_buf(),
                    what,
                    found,
                    wanted,
                });
            }
        } else {
            let holds = |dir: &Path| std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some());
            if dir.is_file() || holds(dir) {
                return Err(TeacherError::NoCache {
                    path: dir.to_path_buf(),
                    why: format!("it has no {ABOUT}"),
                });
            }
            std::fs::create_dir_all(dir).map_err(|e| failed(dir, e))?;
            let json = serde_json::to_vec_pretty(&About {
                format: FORMAT.to_owned(),
                binding: binding.clone(),
            });
            let json = json.map_err(|e| failed(&about, e.into()))?;
            write_file(&about, &json).map_err(|e| failed(&about, e))?;
        }
        Ok(Self {
            teacher,
            dir: dir.to_path_buf(),
            top_k: binding.top_k.min(binding.vocab_size),
            vocab_size: binding.vocab_size,
            counts: Counts::default(),
        })
    }

    /// How often it had what was asked.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// What a file holds of a sequence. One that is damaged counts as none, and is named in the log.
    fn read(&mut self, key: &str, rows: usize) -> Result<Option<TopK>, TeacherError> {
        let path = self.path(key);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(failed(&path, e)),
        };
        match unpack(&bytes, key, (rows, self.top_k), self.vocab_size) {
            Ok(scores) => Ok(Some(scores)),
            Err(why) => {
                self.counts.damaged += 1;
                tracing::warn!("{}: {why}; the teacher is asked again", path.display());
                Ok(None)
            }
        }
    }

    fn write(&self, key: &str, scores: &TopK) -> Result<(), TeacherError> {
        let path = self.path(key);
        let dir = path.parent().unwrap_or(&self.dir);
        std::fs::create_dir_all(dir).map_err(|e| failed(dir, e))?;
        let bytes = pack(key, scores).map_err(|e| failed(&path, e))?;
        write_file(&path, &bytes).map_err(|e| failed(&path, e))
    }

    fn path(&self, key: &str) -> PathBuf {
        self.dir.join(&key[..2]).join(format!("{key}.zst"))
    }
}

impl Teacher for Cached<'_> {
    fn name(&self) -> String {
        self.teacher.name()
    }

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn score(&mut self, sequences: &[Asked<'_>]) -> Result<Scores, TeacherError> {
        let rows: Vec<usize> = sequences
            .iter()
            .map(|asked| label_places(asked.labels).count())
            .collect();
        let mut scores = Vec::with_capacity(sequences.len());
        for (asked, rows) in sequences.iter().zip(&rows) {
            scores.push(self.read(&key(asked), *rows)?);
        }
        let missing: Vec<usize> = (0..sequences.len()).filter(|i| scores[*i].is_none()).collect();
        self.counts.found += sequences.len() - missing.len();
        self.counts.asked += missing.len();
        if !missing.is_empty() {
            let asked: Vec<Asked<'_>> = missing.iter().map(|i| sequences[*i]).collect();
            let mut said = match self.teacher.score(&asked)? {
                Scores::Top(top) => top,
                Scores::Full(logits) => top_k(logits.as_ref(), self.top_k, self.vocab_size)?,
                Scores::Label(_) => {
                    return Err(TeacherError::NothingToCache {
                        teacher: self.teacher.name(),
                    });
                }
            };
            for i in missing {
                let later = |numbers: usize| rows[i] * numbers;
                let rest = TopK {
                    k: said.k,
                    ids: said.ids.split_off(later(said.k)),
                    logprobs: said.logprobs.split_off(later(said.k)),
                };
                self.write(&key(&sequences[i]), &said)?;
                scores[i] = Some(std::mem::replace(&mut said, rest));
            }
        }
        // Servers tell as many tokens as they have: all rows get as many.
        let parts = || scores.iter().flatten().filter(|part| !part.ids.is_empty());
        let k = parts().map(|part| part.k).min().unwrap_or(self.top_k);
        let (mut ids, mut logprobs) = (Vec::new(), Vec::new());
        for part in parts() {
            part.ids
                .chunks_exact(part.k)
                .for_each(|row| ids.extend(&row[..k]));
            part.logprobs
                .chunks_exact(part.k)
                .for_each(|row| logprobs.extend(&row[..k]));
        }
        Ok(Scores::Top(TopK { k, ids, logprobs }))
    }
}

/// The k most probable tokens of each row, among the first `vocab_size`.
pub fn top_k(logits: &dyn LogitRows, k: usize, vocab_size: usize) -> candle_core::Result<TopK> {
    let (width, vocab_size) = (logits.vocab_size(), vocab_size.min(logits.vocab_size()));
    let k = k.min(vocab_size);
    let mut top = TopK {
        k,
        ids: Vec::with_capacity(logits.rows() * k),
        logprobs: Vec::with_capacity(logits.rows() * k),
    };
    let mut chunk = Vec::new();
    for first in (0..logits.rows()).step_by(ROWS) {
        let rows = first..(first + ROWS).min(logits.rows());
        chunk.resize(rows.len() * width, 0.0f32);
        logits.read(rows, &mut chunk)?;
        for row in chunk.chunks_exact(width) {
            let row = &row[..vocab_size];
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = row.iter().map(|x| f64::from(x - max).exp()).sum();
            let mut order: Vec<u32> = (0..vocab_size as u32).collect();
            let by_logit = |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b));
            if k < vocab_size {
                order.select_nth_unstable_by(k, by_logit);
                order.truncate(k);
            }
            order.sort_unstable_by(by_logit);
            for id in order {
                top.ids.push(id);
                top.logprobs
                    .push((f64::from(row[id as usize] - max) - sum.ln()) as f32);
            }
        }
    }
    Ok(top)
}

/// What a sequence is found by: its tokens, which of them are asked about, and which teacher answers.
fn key(asked: &Asked<'_>) -> String {
    let mut hash = Sha256::new();
    hash.update((asked.ids.len() as u64).to_le_bytes());
    asked.ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
    for (place, label) in asked.labels.iter().enumerate() {
        hash.update([u8::from(place > 0 && *label >= 0)]);
    }
    hash.update(asked.route.unwrap_or_default());
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn failed(path: &Path, source: io::Error) -> TeacherError {
    TeacherError::CacheFile {
        path: path.to_path_buf(),
        source,
    }
}

/// The bytes of a file: magic, key, rows and k, then the planes of tokens and of log p, all under Zstandard.
fn pack(key: &str, scores: &TopK) -> io::Result<Vec<u8>> {
    let rows = scores.ids.len() / scores.k.max(1);
    let mut bytes = MAGIC.to_vec();
    bytes.extend(key.as_bytes());
    for count in [rows, scores.k] {
        bytes.extend(u32::try_from(count).map_err(io::Error::other)?.to_le_bytes());
    }
    let ids: Vec<[u8; 4]> = scores.ids.iter().map(|id| id.to_le_bytes()).collect();
    let logprobs: Vec<[u8; 4]> = scores.logprobs.iter().map(|x| x.to_le_bytes()).collect();
    for numbers in [&ids, &logprobs] {
        (0..4).for_each(|plane| bytes.extend(numbers.iter().map(|number| number[plane])));
    }
    let mut encoder = zstd::bulk::Compressor::new(LEVEL)?;
    encoder.include_checksum(true)?;
    encoder.compress(&bytes)
}

/// What a file holds, or why it cannot be used. So many rows are asked for, of so many tokens at most.
fn unpack(bytes: &[u8], key: &str, (rows, most): (usize, usize), vocab_size: usize) -> Result<TopK, String> {
    let header = MAGIC.len() + key.len();
    let room = header + 8 + rows.saturating_mul(most).saturating_mul(8);
    let bytes = zstd::bulk::decompress(bytes, room).map_err(|e| format!("it is damaged: {e}"))?;
    let (head, rest) = bytes.split_at_checked(header + 8).ok_or("it is too short")?;
    if &head[..MAGIC.len()] != MAGIC {
        return Err("it holds no scores".into());
    }
    if &head[MAGIC.len()..header] != key.as_bytes() {
        return Err("it holds the scores of another sequence".into());
    }
    let count = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]) as usize;
    let (found, k) = (count(header), count(header + 4));
    let numbers = found.checked_mul(k).ok_or("its counts are too large")?;
    if found != rows || Some(rest.len()) != numbers.checked_mul(8) {
        return Err(format!(
            "it has {found} rows of {k} tokens in {} bytes, and {rows} are asked for",
            rest.len()
        ));
    }
    let number = |i: usize, of: usize| -> [u8; 4] {
        std::array::from_fn(|plane| rest[(of * 4 + plane) * numbers + i])
    };
    let ids: Vec<u32> = (0..numbers).map(|i| u32::from_le_bytes(number(i, 0))).collect();
    let logprobs: Vec<f32> = (0..numbers).map(|i| f32::from_le_bytes(number(i, 1))).collect();
    let known = ids.iter().all(|id| (*id as usize) < vocab_size);
    if !known || logprobs.iter().any(|x| x.is_nan() || *x > 1e-3) {
        return Err("it holds tokens or probabilities that there are not".into());
    }
    Ok(TopK { k, ids, logprobs })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A teacher of four tokens whose logits follow from the token before; it counts what it is asked.
    struct Four {
        full: bool,
        asked: std::rc::Rc<std::cell::Cell<usize>>,
    }

    struct FourRows(Vec<f32>);

    impl LogitRows for FourRows {
        fn rows(&self) -> usize {
            self.0.len() / 4
        }
        fn vocab_size(&self) -> usize {
            4
        }
        fn read(&self, rows: std::ops::Range<usize>, out: &mut [f32]) -> candle_core::Result<()> {
            out.copy_from_slice(&self.0[rows.start * 4..rows.end * 4]);
            Ok(())
        }
    }

    impl Teacher for Four {
        fn name(&self) -> String {
            "four".into()
        }
        fn vocab_size(&self) -> usize {
            4
        }
        fn score(&mut self, sequences: &[Asked<'_>]) -> Result<Scores, TeacherError> {
            self.asked.set(self.asked.get() + sequences.len());
            let mut logits = Vec::new();
            for asked in sequences {
                for place in label_places(asked.labels) {
                    let before = asked.ids[place - 1] as f32;
                    logits.extend([before, 0.3 * before, 1.0, -2.0 * before]);
                }
            }
            let rows = FourRows(logits);
            Ok(match self.full {
                true => Scores::Full(Box::new(rows)),
                false => Scores::Top(top_k(&rows, 2, 4)?),
            })
        }
    }

    fn binding() -> Binding {
        Binding {
            teacher: "four".into(),
            tokenizer_sha256: "aa".into(),
            template_sha256: "bb".into(),
            vocab_size: 4,
            top_k: 2,
        }
    }

    fn open(dir: &Path, full: bool) -> (Cached<'static>, std::rc::Rc<std::cell::Cell<usize>>) {
        let asked = std::rc::Rc::default();
        let teacher = Box::new(Four {
            full,
            asked: std::rc::Rc::clone(&asked),
        });
        (Cached::open(dir, teacher, &binding()).unwrap(), asked)
    }

    const LONG: Asked<'static> = Asked {
        ids: &[3, 1, 2, 0, 3],
        labels: &[-100, 1, 2, -100, 3],
        route: None,
    };
    const SHORT: Asked<'static> = Asked {
        ids: &[2, 3],
        labels: &[2, 3],
        route: None,
    };

    fn top(cached: &mut Cached<'_>, sequences: &[Asked<'_>]) -> TopK {
        match cached.score(sequences).unwrap() {
            Scores::Top(top) => top,
            _ => panic!("no top k"),
        }
    }

    #[test]
    fn what_is_found_has_the_bits_of_what_was_asked() {
        let dir = tempfile::tempdir().unwrap();
        let (mut fresh, asked) = open(dir.path(), true);
        let first = top(&mut fresh, &[LONG, SHORT]);
        assert_eq!((first.k, first.ids.len(), asked.get()), (2, 8, 2));
        // log p of tokens 0 and 2 behind token 3: logits 3, 0.9, 1, −6.
        let sum = [3f64, 0.9, 1.0, -6.0].iter().map(|x| x.exp()).sum::<f64>().ln();
        assert_eq!(first.ids[..2], [0, 2]);
        assert!((f64::from(first.logprobs[0]) - (3.0 - sum)).abs() < 1e-6);

        let (mut again, asked) = open(dir.path(), true);
        assert_eq!(top(&mut again, &[SHORT]).ids, first.ids[6..]);
        let second = top(&mut again, &[LONG, SHORT]);
        assert_eq!((&second.ids, second.k), (&first.ids, 2));
        let bits = |top: &TopK| top.logprobs.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&second), bits(&first));
        assert_eq!(asked.get(), 0);
        assert_eq!(
            again.counts(),
            Counts {
                found: 3,
                asked: 0,
                damaged: 0
            }
        );
        // Other labels of the same tokens, and the same under another teacher's route, are something else.
        let other = Asked {
            labels: &[-100, -100, 2, -100, 3],
            ..LONG
        };
        assert_eq!(top(&mut again, &[other]).ids.len(), 4);
        top(
            &mut again,
            &[Asked {
                route: Some("nl"),
                ..LONG
            }],
        );
        assert_eq!(asked.get(), 2);
    }

    #[test]
    fn damaged_files_are_asked_for_again_and_only_they() {
        let dir = tempfile::tempdir().unwrap();
        let (mut cached, asked) = open(dir.path(), false);
        let right = top(&mut cached, &[LONG, SHORT]);
        let path = cached.path(&key(&LONG));
        let whole = std::fs::read(&path).unwrap();
        let other = std::fs::read(cached.path(&key(&SHORT))).unwrap();
        let mut cases = vec![
            whole[..whole.len() - 1].to_vec(),
            vec![],
            b"not zstd".to_vec(),
            other,
        ];
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 0x10;
            cases.push(flipped);
        }
        let (mut counted, cases_count) = (asked.get(), cases.len());
        for bytes in cases {
            std::fs::write(&path, &bytes).unwrap();
            let before = cached.counts().damaged;
            assert_eq!(top(&mut cached, &[LONG, SHORT]), right);
            counted += cached.counts().damaged - before;
            assert_eq!(asked.get(), counted, "the other sequence is not asked about");
            if cached.counts().damaged > before {
                assert_eq!(std::fs::read(&path).unwrap(), whole, "it is written anew");
            }
        }
        // A flipped bit in what Zstandard does not look at changes nothing.
        assert!(
            cached.counts().damaged >= cases_count - 4,
            "{:?}",
            cached.counts()
        );
    }

    #[test]
    fn a_cache_of_something_else_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path(), true);
        let refused = |change: fn(&mut Binding)| {
            let mut binding = binding();
            change(&mut binding);
            let teacher = Box::new(Four {
                full: true,
                asked: std::rc::Rc::default(),
            });
            match Cached::open(dir.path(), teacher, &binding) {
                Err(error) => error.to_string(),
                Ok(_) => panic!("not refused"),
            }
        };
        assert!(refused(|b| b.teacher = "five".into()).contains("another teacher: four, not five"));
        assert!(refused(|b| b.tokenizer_sha256 = "cc".into()).contains("another tokenizer: aa, not cc"));
        assert!(refused(|b| b.template_sha256 = "cc".into()).contains("another chat template"));
        assert!(refused(|b| b.top_k = 3).contains("another top k: 2, not 3"));
        std::fs::write(dir.path().join(ABOUT), "{\"format\": \"x\"").unwrap();
        assert!(refused(|_| ()).contains("no cache of scores"));
        std::fs::remove_file(dir.path().join(ABOUT)).unwrap();
        std::fs::write(dir.path().join("thesis.txt"), "").unwrap();
        assert!(refused(|_| ()).contains("no cache.json"));
    }
}
