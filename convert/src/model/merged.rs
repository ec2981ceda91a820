//! Rows of a planned tensor with all adapters in them.

use super::plan::Source;
use super::{ModelError, Plan};
use crate::arch::TensorRule;

impl Plan<'_> {
    /// Lets the adapters learn what they need of whole tensors. To be called before [`Plan::merged_rows`].
    pub(super) fn prepare_merge(&self) -> Result<(), ModelError> {
        for job in &self.jobs {
            if let Source::Checkpoint(rule) = &job.source {
                self.merge
                    .prepare(&rule.hf, (job.rows, job.columns), |first, values| {
                        self.model.read_rows(rule, first, job.columns, values)
                    })?;
            }
        }
        Ok(())
    }

    /// Rows in the order of the GGUF file, from row `first` on: read, merged and changed as the rule says.
    pub(super) fn merged_rows(
        &self,
        rule: &TensorRule,
        first: usize,
        columns: usize,
        values: &mut [f32],
    ) -> Result<(), ModelError> {
        if !self.merge.replaces(&rule.hf) {
            self.model.read_rows(rule, first, columns, values)?;
        }
        let row = |at| rule.rows.to_hf(first + at);
        self.merge.apply(&rule.hf, row, columns, values)?;
        rule.change.apply(values);
        Ok(())
    }
}
