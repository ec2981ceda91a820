//! Our own seeded randomness: the same seed gives the same bits, on every machine.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng as _};

/// A stream of random numbers.
#[derive(Debug, Clone)]
pub struct Random(ChaCha8Rng);

impl Random {
    /// The stream of this seed that has this purpose: streams of different purposes are independent.
    pub fn new(seed: u64, purpose: &str) -> Self {
        let purpose = purpose.bytes().fold(0, |hash, byte| mix(hash ^ u64::from(byte)));
        Self(ChaCha8Rng::seed_from_u64(mix(seed) ^ purpose))
    }

    /// Uniform over all of u64.
    pub fn u64(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// Uniform in [0, 1), with 53 bits.
    pub fn uniform(&mut self) -> f64 {
        (self.u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// From N(0, 1), by Box and Muller.
    pub fn normal(&mut self) -> f64 {
        // 1 − u is in (0, 1]: its logarithm is finite.
        let (radius, angle) = (1.0 - self.uniform(), self.uniform());
        (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()
    }

    /// Uniform in 0..n.
    pub fn below(&mut self, n: usize) -> usize {
        // The bias of a 128-bit product is below n / 2⁶⁴.
        ((u128::from(self.u64()) * n as u128) >> 64) as usize
    }

    /// Fisher and Yates' shuffle.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

/// SplitMix64's finaliser: a bijection of u64 whose output looks random.
pub fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_bits_on_every_machine() {
        assert_eq!(mix(0), 0xe220_a839_7b1d_cdaf); // SplitMix64's first output for seed 0.
        let (mut a, mut b) = (Random::new(7, "data"), Random::new(7, "data"));
        assert_eq!([a.u64(), a.u64()], [b.u64(), b.u64()]);
        assert_ne!(a.u64(), Random::new(7, "lora").u64());
    }

    #[test]
    fn normal_numbers_have_their_moments() {
        let mut random = Random::new(3, "normal");
        let numbers: Vec<f64> = (0..100_000).map(|_| random.normal()).collect();
        let moment = |power: i32| numbers.iter().map(|x| x.powi(power)).sum::<f64>() / 1e5;
        let (mean, variance, kurtosis) = (moment(1), moment(2), moment(4));
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.02 && (kurtosis - 3.0).abs() < 0.1);
    }

    #[test]
    fn a_shuffle_keeps_every_item() {
        let mut items: Vec<usize> = (0..100).collect();
        Random::new(1, "shuffle").shuffle(&mut items);
        assert_ne!(items, (0..100).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..100).collect::<Vec<_>>());
    }
}
