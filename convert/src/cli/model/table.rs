//! What `--dry-run` prints: every tensor, its type, and why.

use std::io::Write;

use pipit_convert::model::{Plan, PlannedTensor};
use pipit_convert::quantize::Repack;
use serde_json::json;

use super::super::{Context, size};

pub(super) fn print(plan: &Plan<'_>, context: &Context) -> anyhow::Result<()> {
    let (table, bytes) = (plan.table(), plan.file_size()?);
    let weights: u64 = table.iter().map(|t| t.dimensions.iter().product::<u64>()).sum();
    let bits = table.iter().map(|t| t.bytes).sum::<u64>() as f64 * 8.0 / weights.max(1) as f64;
    let fallbacks = table.iter().filter(|tensor| tensor.fallback.is_some()).count();
    let mut stdout = std::io::stdout().lock();
    if context.json {
        let report = json!({
            "architecture": plan.architecture.name, "bytes": bytes, "bits_per_weight": bits, "fallbacks": fallbacks,
            "peak_memory": plan.peak_memory(), "tensors": table,
        });
        writeln!(stdout, "{report}")?;
        return Ok(());
    }
    let width = table.iter().map(|tensor| tensor.name.len()).max().unwrap_or(0);
    writeln!(
        stdout,
        "{:width$}  {:7} {:>5}  {:>14}  {:>10}  {:6}  why",
        "tensor", "type", "bits", "shape", "size", "repack"
    )?;
    for tensor in &table {
        let dimensions: Vec<_> = tensor.dimensions.iter().map(u64::to_string).collect();
        let repacked = match tensor.repacked {
            Some(Repack::Yes) => "yes",
            Some(Repack::Copy) => "copy",
            Some(Repack::No) => "no",
            None => "",
        };
        writeln!(
            stdout,
            "{:width$}  {:7} {:5.2}  {:>14}  {:>10}  {repacked:6}  {}",
            tensor.name,
            tensor.kind,
            tensor.bits,
            dimensions.join("×"),
            size(tensor.bytes),
            why(tensor),
        )?;
    }
    writeln!(
        stdout,
        "{} tensors, {} (without provenance), {bits:.2} bits per weight, {fallbacks} with a fallback; nothing was \
         written",
        table.len(),
        size(bytes)
    )?;
    let parts = |of: Repack| table.iter().filter(move |tensor| tensor.repacked == Some(of));
    let bytes = |of: Repack| parts(of).map(|tensor| tensor.bytes).sum::<u64>();
    writeln!(
        stdout,
        "repack: ARM cores with dotprod rearrange {} of the matrices, {} they use as they are{}",
        size(bytes(Repack::Yes) + bytes(Repack::Copy)),
        size(bytes(Repack::No)),
        match bytes(Repack::Copy) {
            0 => String::new(),
            copy => format!("; {} of embeddings is in memory twice", size(copy)),
        }
    )?;
    writeln!(
        stdout,
        "memory: writing it takes about {} at most",
        size(plan.peak_memory())
    )?;
    Ok(())
}

/// `Q6_K: embeddings that are the output too; rows of 576 are no whole blocks of 256; from model.embed_tokens.weight`
fn why(tensor: &PlannedTensor) -> String {
    let mut parts = Vec::new();
    match (&tensor.rule, &tensor.fallback) {
        (Some(rule), Some(_)) => parts.push(format!("{} by {rule}", tensor.asked)),
        (None, Some(_)) => parts.push(format!("{} asked", tensor.asked)),
        (Some(rule), None) => parts.push(rule.clone()),
        (None, None) => {}
    }
    parts.extend(tensor.fallback.clone());
    if tensor.merged {
        parts.push("adapter merged".into());
    }
    if tensor.from.is_none() {
        parts.push("computed".into());
    }
    parts.join("; ")
}
