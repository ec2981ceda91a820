//! The rows of a Parquet file: read as the JSON lines that they would be, so that both kinds of file mean the same.
//! A value that is null is not there, in a message too (tables give every message every key).

use std::path::Path;

use super::{DataError, Rows};

/// Reads the rows of a Parquet file, at most `limit`; their numbers, from 1, stand for lines.
#[cfg(feature = "parquet")]
pub(super) fn read(path: &Path, limit: Option<usize>) -> Result<Rows, DataError> {
    use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

    // The library's messages begin with its name, which ours says already.
    let bad = |why: String| DataError::Parquet {
        path: path.to_path_buf(),
        why: why.trim_start_matches("Parquet error: ").to_owned(),
    };
    let file = std::fs::File::open(path).map_err(|source| DataError::Read {
        path: path.to_path_buf(),
        source,
    })?;
    let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| bad(e.to_string()))?;
    let batches = builder.build().map_err(|e| bad(e.to_string()))?;
    let (mut rows, mut line) = (Rows::default(), 0);
    for batch in batches {
        let batch = batch.map_err(|e| bad(e.to_string()))?;
        let mut json = arrow_json::LineDelimitedWriter::new(Vec::new());
        json.write(&batch).map_err(|e| bad(e.to_string()))?;
        json.finish().map_err(|e| bad(e.to_string()))?;
        let json = json.into_inner();
        for bytes in json.split(|byte| *byte == b'\n').take(batch.num_rows()) {
            line += 1;
            rows.push(limit, line, bytes);
        }
    }
    Ok(rows)
}

/// Refuses the file: this program was built without the feature.
#[cfg(not(feature = "parquet"))]
pub(super) fn read(path: &Path, _limit: Option<usize>) -> Result<Rows, DataError> {
    Err(DataError::NoParquet {
        path: path.to_path_buf(),
    })
}
