//! Rows that stand before every sequence of a batch, put in and taken out again, with a gradient. They are composed
//! of candle's own `cat` and `index_select`, so they run on every device.

use candle_core::{Result, Tensor};

/// The rows at which sequences begin once `count` rows stand before each, and last the number of rows.
pub(crate) fn widened(starts: &[usize], count: usize) -> Vec<usize> {
    starts
        .iter()
        .enumerate()
        .map(|(i, start)| start + i * count)
        .collect()
}

/// Puts the same rows before every sequence: before `[count, width]`, rows `[rows, width]` →
/// `[rows + count · sequences, width]`. `starts` are those of `rows`. The gradient of `before` is the sum over the
/// sequences.
pub fn put_before(before: &Tensor, rows: &Tensor, starts: &[usize]) -> Result<Tensor> {
    let count = before.dim(0)?;
    let mut index = Vec::with_capacity(widened(starts, count).last().copied().unwrap_or(0));
    for w in starts.windows(2) {
        index.extend(0..count as u32);
        index.extend((count + w[0]) as u32..(count + w[1]) as u32);
    }
    let length = index.len();
    let index = Tensor::from_vec(index, length, rows.device())?;
    Tensor::cat(&[before, rows], 0)?.index_select(&index, 0)
}

/// Takes the first `count` rows of every sequence away. `starts` are those of the result.
pub fn take_before(x: &Tensor, count: usize, starts: &[usize]) -> Result<Tensor> {
    if count == 0 {
        return Ok(x.clone());
    }
    let wide = widened(starts, count);
    let index: Vec<u32> = wide
        .windows(2)
        .flat_map(|w| (w[0] + count) as u32..w[1] as u32)
        .collect();
    let length = index.len();
    x.index_select(&Tensor::from_vec(index, length, x.device())?, 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ops::gradcheck::{check, random};

    const STARTS: [usize; 4] = [0, 2, 3, 7];

    #[test]
    fn the_rows_stand_before_every_sequence_and_go_again() {
        let (before, rows) = (random(&[2, 3], 40), random(&[7, 3], 41));
        let wide = put_before(&before, &rows, &STARTS).unwrap();
        assert_eq!(widened(&STARTS, 2), [0, 4, 7, 13]);
        let (before, rows, wide) = (
            before.to_vec2::<f64>(),
            rows.to_vec2::<f64>(),
            wide.to_vec2::<f64>(),
        );
        let (before, rows, wide) = (before.unwrap(), rows.unwrap(), wide.unwrap());
        assert_eq!([&before[..], &rows[..2]].concat(), wide[..4]);
        assert_eq!(
            [&before[..], &rows[2..3], &before[..], &rows[3..]].concat(),
            wide[4..]
        );
    }

    #[test]
    fn gradients_are_the_differences() {
        let (before, rows) = (random(&[2, 3], 42), random(&[7, 3], 43));
        check(&[&before, &rows], |args| put_before(&args[0], &args[1], &STARTS));
        let wide = random(&[13, 3], 44);
        check(&[&wide], |args| take_before(&args[0], 2, &STARTS));
    }
}
