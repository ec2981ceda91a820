//! Numbers that the CPU kernels work on: f32 for training, f64 for the gradient checks.

use std::borrow::Cow;

use candle_core::{CpuStorage, DType, Device, Layout, Result, Storage, Tensor, WithDType};

use super::few_rows;

/// f32 or f64, with the few functions that the kernels need.
pub(crate) trait Real: WithDType {
    /// eˣ. In f32 a polynomial without branches, so that loops over it become vector code.
    fn exp(self) -> Self;
    /// ln x of a positive number that is not subnormal, likewise.
    fn ln(self) -> Self;
    /// √x.
    fn sqrt(self) -> Self;
    /// f32 numbers as this type, without a copy where they are.
    fn from_f32(values: &[f32]) -> Cow<'_, [Self]>;
    /// The same of a vector.
    fn from_f32_vec(values: Vec<f32>) -> Vec<Self> {
        Self::from_f32(&values).into_owned()
    }
    /// x·Wᵀ in the way for few rows, where this type has one and x has few ([`few_rows`]).
    fn few_rows(_x: &[Self], _weight: &[Self], _sizes: (usize, usize, usize)) -> Option<Vec<Self>> {
        None
    }
    /// The number nearest to a constant.
    fn of(value: f64) -> Self {
        Self::from_f64(value)
    }
    /// 1 / (1 + e⁻ˣ).
    #[inline(always)]
    fn sigmoid(self) -> Self {
        let one = Self::one();
        one / (one + (Self::zero() - self).exp())
    }
}

impl Real for f32 {
    /// Cephes' `expf`: x = n·ln 2 + r, a polynomial of degree five in r, and n added to the exponent.
    /// The error is below 2 units in the last place; arguments below −87.3 give a number near 1e-38, not 0.
    #[inline(always)]
    fn exp(self) -> Self {
        const ROUND: f32 = 12_582_912.0; // 1.5·2²³: adding it rounds to an integer in the low bits.
        let x = if self > 88.0 { 88.0 } else { self };
        let x = if x < -87.3 { -87.3 } else { x };
        let shifted = x * std::f32::consts::LOG2_E + ROUND;
        let n = shifted - ROUND;
        let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
        let p = 1.987_569_1e-4;
        let p = p * r + 1.398_199_9e-3;
        let p = p * r + 8.333_452e-3;
        let p = p * r + 4.166_579_6e-2;
        let p = p * r + 1.666_666_5e-1;
        let p = p * r + 0.5;
        let y = p * r * r + r + 1.0;
        let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
        let y = y * Self::from_bits(exponent);
        // A NaN must stay one: the comparisons above let it through, the exponent's bits may not.
        if self.is_nan() { self } else { y }
    }
    /// Cephes' `logf`: x = 2ⁿ·(1 + r) with 1 + r between √½ and √2, and a polynomial of degree eight in r.
    /// The error is below 2 units in the last place; 1 gives 0.
    #[inline(always)]
    fn ln(self) -> Self {
        let bits = self
            .to_bits()
            .wrapping_sub(std::f32::consts::FRAC_1_SQRT_2.to_bits());
        let n = (bits as i32 >> 23) as Self;
        let fraction = (bits & 0x007f_ffff).wrapping_add(std::f32::consts::FRAC_1_SQRT_2.to_bits());
        let r = Self::from_bits(fraction) - 1.0;
        let p = 7.037_683_6e-2;
        let p = p * r - 1.151_461e-1;
        let p = p * r + 1.167_699_9e-1;
        let p = p * r - 1.242_014_1e-1;
        let p = p * r + 1.424_932_3e-1;
        let p = p * r - 1.666_805_8e-1;
        let p = p * r + 2.000_071_5e-1;
        let p = p * r - 2.499_999_4e-1;
        let p = p * r + 3.333_333e-1;
        let square = r * r;
        let y = p * r * square - n * 2.121_944_4e-4 - 0.5 * square;
        r + y + n * 0.693_359_4
    }
    fn sqrt(self) -> Self {
        self.sqrt()
    }
    fn from_f32(values: &[f32]) -> Cow<'_, [Self]> {
        values.into()
    }
    fn from_f32_vec(values: Vec<f32>) -> Vec<Self> {
        values
    }
    fn few_rows(x: &[Self], weight: &[Self], sizes: (usize, usize, usize)) -> Option<Vec<Self>> {
        few_rows::product(x, weight, sizes)
    }
}

impl Real for f64 {
    fn exp(self) -> Self {
        self.exp()
    }
    fn ln(self) -> Self {
        self.ln()
    }
    fn sqrt(self) -> Self {
        self.sqrt()
    }
    fn from_f32(values: &[f32]) -> Cow<'_, [Self]> {
        values.iter().copied().map(Self::from).collect()
    }
}

/// Runs `$body` with `$t` standing for the Rust type of `$dtype`, or fails with the operation's name.
macro_rules! for_real {
    ($dtype:expr, $op:expr, $t:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $t = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $t = f64;
                $body
            }
            other => candle_core::bail!("{}: {other:?} is not trained on the CPU, F32 is", $op),
        }
    };
}
pub(crate) use for_real;

/// The elements of a contiguous argument of a forward pass.
pub(crate) fn elements<'a, T: Real>(storage: &'a CpuStorage, layout: &Layout, op: &str) -> Result<&'a [T]> {
    let data = T::cpu_storage_as_slice(storage)?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => candle_core::bail!("{op}: the argument is not contiguous"),
    }
}

/// The element type of a storage.
pub(crate) fn dtype(storage: &CpuStorage) -> DType {
    match storage {
        CpuStorage::F64(_) => DType::F64,
        CpuStorage::F32(_) => DType::F32,
        CpuStorage::F16(_) => DType::F16,
        CpuStorage::BF16(_) => DType::BF16,
        _ => DType::U8,
    }
}

/// Calls `f` with the elements of a contiguous tensor on the CPU.
pub(crate) fn with_elements<T: Real, R>(
    tensor: &Tensor,
    op: &str,
    f: impl FnOnce(&[T]) -> Result<R>,
) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(cpu) => f(elements(cpu, layout, op)?),
        _ => candle_core::bail!("{op}: the tensor is not on the CPU"),
    }
}

/// A tensor on the CPU that takes over the vector.
pub(crate) fn tensor<T: Real>(data: Vec<T>, shape: &[usize]) -> Result<Tensor> {
    Tensor::from_vec(data, shape, &Device::Cpu)
}

#[cfg(test)]
mod tests {
    use super::Real;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut x = -87.0f32;
        while x < 88.0 {
            let (ours, exact) = (Real::exp(x), f64::from(x).exp());
            let error = ((f64::from(ours) - exact) / exact).abs();
            assert!(error < 2.4e-7, "exp({x}) = {ours}, not {exact}: {error:e}");
            x += 0.001_37;
        }
        assert_eq!(Real::exp(0.0f32), 1.0);
        assert!(Real::exp(f32::NAN).is_nan());
        assert!(Real::exp(f32::NEG_INFINITY) < 2e-38);
    }

    #[test]
    fn ln_is_within_two_units_in_the_last_place() {
        let mut x = 1.3e-38f32;
        while x < 3e38 {
            let (ours, exact) = (Real::ln(x), f64::from(x).ln());
            let error = (f64::from(ours) - exact).abs();
            assert!(
                error <= 2.4e-7 * exact.abs(),
                "ln({x}) = {ours}, not {exact}: {error:e}"
            );
            x *= 1.000_37;
        }
        assert_eq!(Real::ln(1.0f32), 0.0);
    }
}
