//! Gradients against central differences, in f64.

use candle_core::{Device, Result, Tensor, Var};

/// Deterministic numbers in (−1, 1).
pub(crate) fn random(shape: &[usize], seed: u64) -> Var {
    let count: usize = shape.iter().product();
    let data: Vec<f64> = (0..count as u64)
        .map(|i| {
            let bits = crate::random::mix(seed.wrapping_mul(0x9e37).wrapping_add(i));
            (bits >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        })
        .collect();
    Var::from_vec(data, shape, &Device::Cpu).unwrap()
}

/// Checks the gradient of every argument of `f`, through a random linear functional of its result, against
/// central differences with h = 1e-5: within 1e-6 of the largest entry.
pub(crate) fn check(args: &[&Var], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let scalar = |args: &[Tensor]| -> Tensor {
        let out = f(args).unwrap();
        let weights = random(out.dims(), 99);
        (out * weights.as_tensor()).unwrap().sum_all().unwrap()
    };
    let tensors: Vec<Tensor> = args.iter().map(|var| var.as_tensor().clone()).collect();
    let grads = scalar(&tensors).backward().unwrap();
    for (which, arg) in args.iter().enumerate() {
        let ours = grads
            .get(arg)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1::<f64>()
            .unwrap();
        let at = arg.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let largest = ours.iter().fold(0.0f64, |max, g| max.max(g.abs()));
        assert!(largest > 0.0, "argument {which} has no gradient");
        for i in 0..at.len() {
            let shifted = |by: f64| {
                let mut moved = at.clone();
                moved[i] += by;
                let mut tensors = tensors.clone();
                tensors[which] = Tensor::from_vec(moved, arg.dims(), &Device::Cpu).unwrap();
                scalar(&tensors).to_scalar::<f64>().unwrap()
            };
            let numeric = (shifted(1e-5) - shifted(-1e-5)) / 2e-5;
            assert!(
                (numeric - ours[i]).abs() < 1e-6 * largest.max(1.0),
                "argument {which}, element {i}: {} but the difference is {numeric}",
                ours[i]
            );
        }
    }
}
