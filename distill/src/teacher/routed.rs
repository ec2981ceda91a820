//! Several teachers, each for the rows that name it.

use std::collections::BTreeMap;
use std::ops::Range;

use super::{Asked, LogitRows, Scores, Teacher, TeacherError, TopK, label_places};

/// Teachers by the value of a column of the data.
pub struct Routed<'a> {
    teachers: BTreeMap<String, Box<dyn Teacher + 'a>>,
}

impl<'a> Routed<'a> {
    /// Teachers under the values that choose them.
    pub fn new(
        teachers: impl IntoIterator<Item = (String, Box<dyn Teacher + 'a>)>,
    ) -> Result<Self, TeacherError> {
        let mut routed = Self {
            teachers: BTreeMap::new(),
        };
        for (route, teacher) in teachers {
            if routed.teachers.contains_key(&route) {
                return Err(TeacherError::RouteTwice { route });
            }
            routed.teachers.insert(route, teacher);
        }
        match routed.teachers.is_empty() {
            true => Err(TeacherError::NoTeacher),
            false => Ok(routed),
        }
    }

    /// The values that have a teacher.
    pub fn routes(&self) -> impl Iterator<Item = &str> {
        self.teachers.keys().map(String::as_str)
    }

    fn unknown(&self, route: Option<&str>) -> TeacherError {
        TeacherError::Route {
            route: route.map_or_else(|| "nothing".to_owned(), |route| format!("{route:?}")),
            known: self.routes().collect::<Vec<_>>().join(", "),
        }
    }
}

impl Teacher for Routed<'_> {
    fn name(&self) -> String {
        let names = self
            .teachers
            .iter()
            .map(|(route, teacher)| format!("{route}: {}", teacher.name()));
        names.collect::<Vec<_>>().join(", ")
    }

    /// What all of them tell apart.
    fn vocab_size(&self) -> usize {
        let sizes = self.teachers.values().map(|teacher| teacher.vocab_size());
        sizes.min().unwrap_or(0)
    }

    fn score(&mut self, sequences: &[Asked<'_>]) -> Result<Scores, TeacherError> {
        for asked in sequences {
            if asked.route.is_none_or(|route| !self.teachers.contains_key(route)) {
                return Err(self.unknown(asked.route));
            }
        }
        let vocab_size = self.vocab_size();
        let mut merged = Merged::default();
        let rows: Vec<usize> = sequences
            .iter()
            .map(|asked| label_places(asked.labels).count())
            .collect();
        for (route, teacher) in &mut self.teachers {
            let of_route = |i: &usize| sequences[*i].route == Some(route);
            let places: Vec<usize> = (0..sequences.len()).filter(of_route).collect();
            if places.is_empty() {
                continue;
            }
            let asked: Vec<Asked<'_>> = places.iter().map(|i| sequences[*i]).collect();
            merged.add(&places, &rows, teacher.score(&asked)?);
        }
        merged.scores(vocab_size)
    }
}

/// The answers of several teachers, and which of them each row comes from.
#[derive(Default)]
struct Merged {
    parts: Vec<Scores>,
    /// For every row of a sequence, in the order of the sequences: its sequence, the part, the row in it.
    rows: Vec<(usize, usize, usize)>,
}

impl Merged {
    fn add(&mut self, sequences: &[usize], rows: &[usize], scores: Scores) {
        let part = self.parts.len();
        let mut at = 0;
        for sequence in sequences {
            self.rows
                .extend((at..at + rows[*sequence]).map(|row| (*sequence, part, row)));
            at += rows[*sequence];
        }
        self.parts.push(scores);
    }

    fn scores(mut self, vocab_size: usize) -> Result<Scores, TeacherError> {
        // Stable: the rows of a sequence stay in their order.
        self.rows.sort_by_key(|(sequence, ..)| *sequence);
        let rows: Vec<(usize, usize)> = self.rows.iter().map(|(_, part, row)| (*part, *row)).collect();
        let (mut full, mut top, mut label) = (Vec::new(), Vec::new(), Vec::new());
        for scores in self.parts {
            match scores {
                Scores::Full(logits) => full.push(logits),
                Scores::Top(scores) => top.push(scores),
                Scores::Label(logprobs) => label.push(logprobs),
            }
        }
        match (full.is_empty(), top.is_empty(), label.is_empty()) {
            (_, true, true) => Ok(Scores::Full(Box::new(MergedRows {
                parts: full,
                rows,
                vocab_size,
            }))),
            (true, false, true) => {
                let k = top.iter().map(|part| part.k).min().unwrap_or(0);
                let mut merged = TopK {
                    k,
                    ids: Vec::new(),
                    logprobs: Vec::new(),
                };
                for (part, row) in rows {
                    let from = row * top[part].k;
                    merged.ids.extend(&top[part].ids[from..from + k]);
                    merged.logprobs.extend(&top[part].logprobs[from..from + k]);
                }
                Ok(Scores::Top(merged))
            }
            (true, true, false) => Ok(Scores::Label(
                rows.iter().map(|(part, row)| label[*part][*row]).collect(),
            )),
            _ => Err(TeacherError::MixedScores),
        }
    }
}

/// Logits of several teachers, of the tokens that all of them know.
struct MergedRows {
    parts: Vec<Box<dyn LogitRows>>,
    rows: Vec<(usize, usize)>,
    vocab_size: usize,
}

impl LogitRows for MergedRows {
    fn rows(&self) -> usize {
        self.rows.len()
    }

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn read(&self, rows: Range<usize>, out: &mut [f32]) -> candle_core::Result<()> {
        let follows = |a: &(usize, usize), b: &(usize, usize)| a.0 == b.0 && a.1 + 1 == b.1;
        let mut out = out.chunks_exact_mut(self.vocab_size);
        // Rows that follow each other are read in one go.
        for run in self.rows[rows].chunk_by(follows) {
            let (part, first) = (&self.parts[run[0].0], run[0].1);
            let mut logits = vec![0.0; run.len() * part.vocab_size()];
            part.read(first..first + run.len(), &mut logits)?;
            for (row, out) in logits.chunks_exact(part.vocab_size()).zip(&mut out) {
                out.copy_from_slice(&row[..self.vocab_size]);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Says of every row which teacher it is and how many rows it has given in this call.
    struct Numbers {
        teacher: f32,
        vocab_size: usize,
        k: usize,
    }

    struct NumberRows(Vec<f32>, usize);

    impl LogitRows for NumberRows {
        fn rows(&self) -> usize {
            self.0.len()
        }
        fn vocab_size(&self) -> usize {
            self.1
        }
        fn read(&self, rows: Range<usize>, out: &mut [f32]) -> candle_core::Result<()> {
            for (out, number) in out.chunks_exact_mut(self.1).zip(&self.0[rows]) {
                out.fill(*number);
            }
            Ok(())
        }
    }

    impl Teacher for Numbers {
        fn name(&self) -> String {
            self.teacher.to_string()
        }
        fn vocab_size(&self) -> usize {
            self.vocab_size
        }
        fn score(&mut self, sequences: &[Asked<'_>]) -> Result<Scores, TeacherError> {
            let rows: usize = sequences
                .iter()
                .map(|asked| label_places(asked.labels).count())
                .sum();
            let numbers: Vec<f32> = (0..rows).map(|row| self.teacher + row as f32).collect();
            Ok(match self.k {
                0 => Scores::Full(Box::new(NumberRows(numbers, self.vocab_size))),
                k => Scores::Top(TopK {
                    k,
                    ids: numbers.iter().flat_map(|x| vec![*x as u32; k]).collect(),
                    logprobs: numbers.iter().flat_map(|x| vec![-*x; k]).collect(),
                }),
            })
        }
    }

    fn routed(k: [usize; 2]) -> Routed<'static> {
        let numbers = |teacher, vocab_size, k| -> Box<dyn Teacher> {
            Box::new(Numbers {
                teacher,
                vocab_size,
                k,
            })
        };
        let teachers = [
            ("nl".into(), numbers(10.0, 5, k[0])),
            ("fr".into(), numbers(20.0, 4, k[1])),
        ];
        Routed::new(teachers).unwrap()
    }

    fn asked(route: &str) -> Asked<'_> {
        Asked {
            ids: &[1, 2, 3],
            labels: &[-100, 2, 3],
            route: Some(route),
        }
    }

    #[test]
    fn every_row_comes_from_its_own_teacher_in_the_order_of_the_batch() {
        let sequences = [asked("fr"), asked("nl"), asked("fr")];
        let expected = [20.0, 21.0, 10.0, 11.0, 22.0, 23.0];
        let Scores::Full(logits) = routed([0, 0]).score(&sequences).unwrap() else {
            panic!("no logits")
        };
        assert_eq!((logits.rows(), logits.vocab_size()), (6, 4));
        let mut out = vec![0.0; 5 * 4];
        logits.read(1..6, &mut out).unwrap();
        let wanted: Vec<f32> = expected[1..].iter().flat_map(|x| [*x; 4]).collect();
        assert_eq!(out, wanted);
        // Of top k's, what both have.
        let Scores::Top(top) = routed([3, 2]).score(&sequences).unwrap() else {
            panic!("no top k")
        };
        assert_eq!((top.k, top.ids.len()), (2, 12));
        assert_eq!(
            top.logprobs.iter().step_by(2).map(|x| -x).collect::<Vec<_>>(),
            expected
        );
    }

    #[test]
    fn what_has_no_teacher_is_refused_by_name() {
        let error = |sequences: &[Asked<'_>], k| match routed(k).score(sequences) {
            Err(error) => error.to_string(),
            Ok(_) => panic!("not refused"),
        };
        let text = error(&[asked("de")], [0, 0]);
        assert!(text.contains("\"de\"") && text.contains("fr, nl"), "{text}");
        let none = Asked {
            route: None,
            ..asked("fr")
        };
        assert!(error(&[none], [0, 0]).contains("nothing"));
        assert!(error(&[asked("fr"), asked("nl")], [0, 2]).contains("kind"));
    }
}
