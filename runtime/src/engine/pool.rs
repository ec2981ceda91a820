//! The pool: which part of the context belongs to whom.
//!
//! llama.cpp keeps the KV of all sequences in one buffer of cells, one for each token; several sequences can share the
//! cells of a common beginning. It does not say how many are free, and a batch that finds no room fails, so this is the
//! account: every sequence lists its cells in the order of their positions, every cell counts its owners. The numbers are
//! ours, not llama.cpp's: what agrees is how many there are.

/// Cells of one sequence, in the order of positions.
pub type Cells = Vec<u32>;

/// The account of all cells.
#[derive(Debug)]
pub struct Pool {
    /// Owners of each cell.
    owners: Vec<u32>,
    free: Vec<u32>,
}

impl Pool {
    /// A pool of `cells` free cells.
    pub fn new(cells: u32) -> Self {
        Self {
            owners: vec![0; cells as usize],
            free: (0..cells).rev().collect(),
        }
    }

    /// Cells that nobody owns.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// All cells.
    pub fn capacity(&self) -> usize {
        self.owners.len()
    }

    /// Takes `count` free cells into `cells`; all or none.
    pub fn take(&mut self, count: usize, cells: &mut Cells) -> bool {
        if count > self.free.len() {
            return false;
        }
        for cell in self.free.drain(self.free.len() - count..) {
            self.owners[cell as usize] = 1;
            cells.push(cell);
        }
        true
    }

    /// The first `count` of `cells`, with one owner more.
    pub fn share(&mut self, cells: &[u32], count: usize) -> Cells {
        let shared = cells[..count.min(cells.len())].to_vec();
        for &cell in &shared {
            self.owners[cell as usize] += 1;
        }
        shared
    }

    /// Gives up all but the first `keep` of `cells`.
    pub fn release(&mut self, cells: &mut Cells, keep: usize) {
        while cells.len() > keep {
            let Some(cell) = cells.pop() else { return };
            let owners = &mut self.owners[cell as usize];
            *owners -= 1;
            if *owners == 0 {
                self.free.push(cell);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn shared_cells_are_free_when_the_last_owner_goes() {
        let mut pool = Pool::new(10);
        let mut a = Cells::new();
        assert!(pool.take(6, &mut a) && !pool.take(5, &mut Cells::new()));
        let mut b = pool.share(&a, 4);
        assert!(pool.take(2, &mut b));
        assert_eq!((pool.free(), b.len()), (2, 6));
        pool.release(&mut a, 0);
        assert_eq!(pool.free(), 4);
        pool.release(&mut b, 4);
        assert_eq!(pool.free(), 6);
        pool.release(&mut b, 0);
        assert_eq!((pool.free(), pool.capacity()), (10, 10));
    }

    proptest! {
        #[test]
        fn every_cell_is_free_or_owned(steps in proptest::collection::vec((0..4_u8, 0..4_usize, 0..4_usize, 0..9_usize), 0..60)) {
            let mut pool = Pool::new(32);
            let mut sequences = vec![Cells::new(); 4];
            for (step, one, other, count) in steps {
                match step {
                    0 => { pool.take(count, &mut sequences[one]); }
                    1 => pool.release(&mut sequences[one], count),
                    _ if one != other => {
                        pool.release(&mut sequences[one], 0);
                        let source = sequences[other].clone();
                        sequences[one] = pool.share(&source, count);
                    }
                    _ => {}
                }
                let mut owned: Vec<u32> = sequences.iter().flatten().copied().collect();
                owned.sort_unstable();
                owned.dedup();
                prop_assert_eq!(owned.len() + pool.free(), 32);
            }
        }
    }
}
