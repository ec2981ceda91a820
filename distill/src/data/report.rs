//! What became of the rows of a file: how many are used, and which were left out or changed, by line.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::Sample;

/// Lines that a warning names.
const SHOWN: usize = 5;

/// What became of the rows of a file. Lines are counted from 1.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DataReport {
    /// Lines that are not empty.
    pub rows: usize,
    /// Rows that are used.
    pub used: usize,
    /// Tokens of the rows that are used.
    pub tokens: usize,
    /// Tokens that are trained on.
    pub trained_tokens: usize,
    /// Tokens of the longest row that is used.
    pub longest: usize,
    /// Not read: rows of the file beyond the number that was asked for.
    pub beyond_limit: usize,
    /// Left out: lines that are no row, with what is wrong.
    pub broken: Vec<(usize, String)>,
    /// Left out: rows whose answer is empty.
    pub empty_answers: Vec<usize>,
    /// Left out: rows of which no token is trained on, after truncation too.
    pub without_trained_token: Vec<usize>,
    /// Used, but cut to the largest length.
    pub truncated: Vec<usize>,
    /// Used, but the prompt's tokens change where the answer is added to it.
    pub uneven_boundary: Vec<usize>,
    /// Used, but with the very tokens of an earlier row: this line, and that one.
    pub duplicates: Vec<(usize, usize)>,
    /// Of evaluation data: rows that are trained on too, with the line in the training data.
    pub in_training_data: Vec<(usize, usize)>,
}

impl DataReport {
    /// Counts the rows that are used: tokens, the longest, and those that are there twice.
    pub(super) fn count(&mut self, samples: &[Sample]) {
        self.used = samples.len();
        let trained = |sample: &Sample| sample.labels.iter().filter(|label| **label >= 0).count();
        self.tokens = samples.iter().map(|sample| sample.ids.len()).sum();
        self.trained_tokens = samples.iter().map(trained).sum();
        self.longest = samples.iter().map(|sample| sample.ids.len()).max().unwrap_or(0);
        let mut first: HashMap<&[u32], usize> = HashMap::new();
        for sample in samples {
            let before = *first.entry(&sample.ids).or_insert(sample.line);
            if before != sample.line {
                self.duplicates.push((sample.line, before));
            }
        }
    }

    /// Marks the rows of this evaluation data that are trained on too: what is measured on them is memory.
    pub fn find_leaks(&mut self, samples: &[Sample], training: &[Sample]) {
        let lines: HashMap<&[u32], usize> = training
            .iter()
            .rev()
            .map(|sample| (sample.ids.as_slice(), sample.line))
            .collect();
        self.in_training_data = samples
            .iter()
            .filter_map(|sample| Some((sample.line, *lines.get(sample.ids.as_slice())?)))
            .collect();
    }

    /// Every kind of row that was left out or changed: what it is, how many, and lines with what more is known.
    pub fn findings(&self) -> Vec<(&'static str, usize, Vec<String>)> {
        let lines = |lines: &[usize]| lines.iter().map(usize::to_string).collect::<Vec<_>>();
        let pairs = |pairs: &[(usize, usize)]| {
            let pair = |(line, other): &(usize, usize)| format!("{line} = {other}");
            pairs.iter().map(pair).collect::<Vec<_>>()
        };
        let broken = self.broken.iter().map(|(line, why)| format!("{line}: {why}"));
        let all = [
            ("rows left out, not readable", broken.collect()),
            ("rows left out, the answer is empty", lines(&self.empty_answers)),
            (
                "rows left out, no token to train on",
                lines(&self.without_trained_token),
            ),
            ("rows cut to the largest length", lines(&self.truncated)),
            (
                "rows whose prompt is tokenised otherwise once the answer follows",
                lines(&self.uneven_boundary),
            ),
            ("rows that are there twice", pairs(&self.duplicates)),
            (
                "rows that are trained on too (what is measured on them is memory)",
                pairs(&self.in_training_data),
            ),
        ];
        let found = all
            .into_iter()
            .filter(|(_, lines): &(_, Vec<String>)| !lines.is_empty());
        found.map(|(what, lines)| (what, lines.len(), lines)).collect()
    }

    /// One line for every kind of row that was left out or changed.
    pub fn warnings(&self) -> Vec<String> {
        let line = |(what, count, lines): (&str, usize, Vec<String>)| {
            // What is wrong with a broken line is long: the first says enough.
            let shown = if what.ends_with("readable") { 1 } else { SHOWN };
            let more = if count > shown { ", …" } else { "" };
            let word = if count > 1 && shown > 1 { "lines" } else { "line" };
            let lines = lines[..count.min(shown)].join(", ");
            format!("{what}: {count} ({word} {lines}{more})")
        };
        let mut warnings: Vec<String> = self.findings().into_iter().map(line).collect();
        if self.beyond_limit > 0 {
            let all = self.rows + self.beyond_limit;
            warnings.push(format!("{} of {all} rows are used, as was asked for", self.rows));
        }
        warnings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(line: usize, ids: &[u32]) -> Sample {
        Sample {
            line,
            ids: ids.to_vec(),
            labels: ids.iter().map(|id| i64::from(*id)).collect(),
        }
    }

    #[test]
    fn rows_that_are_there_twice_and_leaks_are_named_by_line() {
        let training = [
            sample(1, &[1, 2]),
            sample(2, &[3]),
            sample(5, &[1, 2]),
            sample(7, &[1, 2]),
        ];
        let mut report = DataReport::default();
        report.count(&training);
        assert_eq!(report.duplicates, [(5, 1), (7, 1)]);
        assert_eq!((report.used, report.tokens, report.longest), (4, 7, 2));
        assert_eq!(
            report.warnings(),
            ["rows that are there twice: 2 (lines 5 = 1, 7 = 1)"]
        );

        let eval = [sample(1, &[4]), sample(2, &[1, 2]), sample(3, &[3])];
        let mut report = DataReport::default();
        report.count(&eval);
        report.find_leaks(&eval, &training);
        assert_eq!(report.in_training_data, [(2, 1), (3, 2)]);
        assert!(report.warnings()[0].contains("trained on too"));
    }

    #[test]
    fn a_warning_names_the_first_lines() {
        let report = DataReport {
            rows: 9,
            beyond_limit: 3,
            broken: vec![(4, "not JSON".into()), (5, "neither".into())],
            truncated: (1..8).collect(),
            ..DataReport::default()
        };
        let expected = [
            "rows left out, not readable: 2 (line 4: not JSON, …)",
            "rows cut to the largest length: 7 (lines 1, 2, 3, 4, 5, …)",
            "9 of 12 rows are used, as was asked for",
        ];
        assert_eq!(report.warnings(), expected);
    }
}
