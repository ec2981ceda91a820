//! Several token sequences in one batch, one after another, without padding.

use std::sync::Arc;

/// The label of a token that is not trained on, as in torch and transformers.
pub const IGNORED: i64 = -100;

/// Token sequences and what is trained on in them. Row i of the model's matrices is token i of the batch.
#[derive(Debug, Clone)]
pub struct Batch {
    ids: Arc<[u32]>,
    labels: Vec<i64>,
    starts: Arc<[usize]>,
}

impl Batch {
    /// From (ids, labels) of each sequence. A label stands at its own token, as in transformers; the model
    /// predicts it from the token before.
    ///
    /// # Panics
    /// When a sequence has not as many labels as ids.
    pub fn new<'a>(sequences: impl IntoIterator<Item = (&'a [u32], &'a [i64])>) -> Self {
        let (mut all_ids, mut all_labels, mut starts) = (Vec::new(), Vec::new(), vec![0]);
        for (ids, labels) in sequences {
            assert_eq!(ids.len(), labels.len(), "every token has a label");
            all_ids.extend_from_slice(ids);
            all_labels.extend_from_slice(labels);
            starts.push(all_ids.len());
        }
        Self {
            ids: all_ids.into(),
            labels: all_labels,
            starts: starts.into(),
        }
    }

    /// Sequences that only go through the model, without labels.
    pub fn unlabelled<'a>(sequences: impl IntoIterator<Item = &'a [u32]>) -> Self {
        let sequences: Vec<_> = sequences
            .into_iter()
            .map(|ids| (ids, vec![IGNORED; ids.len()]))
            .collect();
        Self::new(sequences.iter().map(|(ids, labels)| (*ids, labels.as_slice())))
    }

    /// All token ids.
    pub fn ids(&self) -> &Arc<[u32]> {
        &self.ids
    }

    /// The rows at which the sequences begin, and last the number of rows.
    pub fn starts(&self) -> Arc<[usize]> {
        self.starts.clone()
    }

    /// The number of tokens.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// The position of every token in its sequence; `before` tokens of sequence i stand in a cache already.
    pub fn positions(&self, before: &[usize]) -> Vec<u32> {
        positions(&self.starts, before)
    }

    /// (row, the token that should follow it) for every label but a sequence's first, which nothing precedes.
    pub fn targets(&self) -> Vec<(usize, u32)> {
        let rows = self.starts.windows(2).flat_map(|w| w[0] + 1..w[1]);
        rows.filter_map(|row| Some((row - 1, u32::try_from(self.labels[row]).ok()?)))
            .collect()
    }

    /// How many tokens are trained on.
    pub fn trained_tokens(&self) -> usize {
        self.targets().len()
    }
}

/// The position of every row in its sequence, where `before` rows of sequence i went before. `starts` are the rows at
/// which the sequences begin, and last the number of rows.
pub(crate) fn positions(starts: &[usize], before: &[usize]) -> Vec<u32> {
    let lengths = starts.windows(2).map(|w| w[1] - w[0]);
    lengths
        .enumerate()
        .flat_map(|(i, length)| {
            let before = before.get(i).copied().unwrap_or(0);
            (before..before + length).map(|position| position as u32)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_answer_token_is_predicted_from_the_last_prompt_token() {
        let batch = Batch::new([(&[5, 6, 7][..], &[-100, -100, 7][..]), (&[8, 9], &[8, 9])]);
        assert_eq!(batch.targets(), [(1, 7), (3, 9)]);
        assert_eq!(batch.positions(&[]), [0, 1, 2, 0, 1]);
        assert_eq!(batch.positions(&[4, 0]), [4, 5, 6, 0, 1]);
        assert_eq!(*batch.starts(), [0, 3, 5]);
    }
}
